"""The three defects of the synthetic bottle: large and small breakage, contamination."""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from datasets.synthetic_scene import (
    MOUTH,
    Array,
    Bool,
    View,
    bell,
    blend,
    grain,
    hole,
    linear,
    noise,
    step,
)

# Shapes: H W the fine grid, N its pixels near the defect, K facets of broken glass.
Defect = Callable[[Generator, View, Array], tuple[Array, Array]]


def broken_large(rng: Generator, view: View, scene: Array) -> tuple[Array, Array]:
    """Break a piece out of the rim; return the scene (H, W, 3) and the region (H, W) of 0 and 1."""
    facets = int(rng.integers(4, 8))
    return _chip(rng, view, scene, facets, rng.uniform(0.18, 0.36), rng.uniform(0.2, 0.36), 1.0)


def broken_small(rng: Generator, view: View, scene: Array) -> tuple[Array, Array]:
    """Chip or crack the rim slightly; return the scene (H, W, 3) and the region (H, W)."""
    if rng.uniform() < 0.3:
        return _crack(rng, view, scene)
    facets = int(rng.integers(2, 4))
    return _chip(rng, view, scene, facets, rng.uniform(0.035, 0.07), rng.uniform(0.06, 0.11), 0.8)


def contamination(rng: Generator, view: View, scene: Array) -> tuple[Array, Array]:
    """Put a fibre, lint or a drop into the mouth; return the scene (H, W, 3) and the region."""
    x, y = _point(0.37 * np.sqrt(rng.uniform(0, 1)), rng.uniform(0, 2 * np.pi))
    kinds = ((_fibre, 0.18, 0.36), (_lint, 0.06, 0.12), (_drop, 0.045, 0.08))
    draw, least, most = kinds[int(rng.integers(len(kinds)))]
    near, part = view.near(x, y, 0.4)
    light, inside = draw(rng, part, x, y, rng.uniform(least, most))
    light = rng.uniform(0.018, 0.042) * light
    changed = scene[near] + light[:, None] * np.array([1.0, 0.98, 0.92])
    return _put(scene, near, inside, np.clip(changed, 0.004, None))


DEFECTS: dict[str, Defect] = {
    "broken_large": broken_large,
    "broken_small": broken_small,
    "contamination": contamination,
}


def _put(scene: Array, near: Bool, inside: Bool, changed: Array) -> tuple[Array, Array]:
    scene, region = scene.copy(), np.zeros(near.shape)
    scene[near] = np.where(inside[:, None], changed, scene[near])
    region[near] = inside
    return scene, region


def _point(radius: float, turn: float) -> tuple[float, float]:
    return radius * np.cos(turn), radius * np.sin(turn)


def _axes(view: View, x: float, y: float, lean: float) -> tuple[Array, Array]:
    """Return the coordinates around (x, y) along `lean` and across it."""
    dx, dy = view.x - x, view.y - y
    return dx * np.cos(lean) + dy * np.sin(lean), dy * np.cos(lean) - dx * np.sin(lean)


def _chip(
    rng: Generator,
    view: View,
    scene: Array,
    facets: int,
    length: float,
    depth: float,
    contrast: float,
) -> tuple[Array, Array]:
    """Break out a piece `length` along the mouth and `depth` outwards, in radii of the bottle."""
    turn = rng.uniform(0, 2 * np.pi)
    near, part = view.near(*_point(MOUTH, turn), 2 * (length + depth))
    shells = _shells(rng, part, turn, facets, length, depth)
    inside = (shells.min(axis=0) < 1) & (part.rim > MOUTH - 0.015)
    glass = _fracture(rng, part, turn, shells, contrast)
    gone = _shells(rng, part, turn, max(2, facets // 2), 0.7 * length, 0.45 * depth).min(axis=0) < 1
    glass = blend(glass, hole(part), 0.9 * gone)
    return _put(scene, near, inside, blend(scene[near], glass, np.full(inside.shape, 0.88)))


def _shells(
    rng: Generator, view: View, turn: float, count: int, length: float, depth: float
) -> Array:
    """Return the norms (K, N) of angular shells strung along the rim; below 1 is inside."""
    wobble = 0.10 * grain(rng, view, 25)
    norms = []
    for place in np.linspace(-1, 1, count) + rng.uniform(-0.3, 0.3, count):
        taper = 1 - 0.35 * abs(place)  # the break is deepest in the middle
        here = turn + 0.75 * place * length / MOUTH
        centre = _point(MOUTH + depth * rng.uniform(0.0, 0.45) * taper, here)
        out, along = _axes(view, *centre, here + rng.normal(0, 0.35))
        out = out / (depth * rng.uniform(0.45, 0.62) * taper)
        along = along / (length * rng.uniform(0.7, 1.1) / np.sqrt(count) + 0.3 * depth)
        power = rng.uniform(1.15, 2.2)  # 1 a diamond, 2 an ellipse
        norms.append((np.abs(out) ** power + np.abs(along) ** power) ** (1 / power) + wobble)
    return np.stack(norms)


def _fracture(rng: Generator, view: View, turn: float, shells: Array, contrast: float) -> Array:
    """Return broken glass, (N, 3): sloping facets with shell ripples and glinting edges."""
    count = len(shells)
    facet = np.argmin(shells, axis=0)
    first, second = np.partition(shells, 1, axis=0)[:2]
    u, v = _axes(view, *_point(MOUTH, turn), 0.0)
    slope = rng.normal(0, 160, (count, 2))[facet]
    lit = np.where(rng.uniform(0, 1, count) < 0.3, rng.uniform(20, 50, count), 0)
    ripple = 7 * np.sin(rng.uniform(14, 24, count)[facet] * first + 3 * grain(rng, view, 20))
    rough = 12 * noise(rng, view.x * 70, view.y * 30, 400)
    relief = (rng.uniform(-20, 16, count) + lit)[facet] + ripple + rough
    level = np.clip(62 + contrast * (relief + slope[:, 0] * u + slope[:, 1] * v), 26, 180)
    brown = (rng.uniform(0, 1, count) < 0.25)[facet]
    tint = np.array([0.97, 1.0, 1.03]) + brown[:, None] * np.array([0.22, 0.0, -0.2])
    edge = np.maximum(bell(second - first, 0.06), bell(first - 0.96, 0.05))
    glint = 0.4 * contrast * edge * np.clip(0.1 + grain(rng, view, 18), 0, None)
    return linear(level)[:, None] * tint + glint[:, None]


def _crack(rng: Generator, view: View, scene: Array) -> tuple[Array, Array]:
    """Draw a jagged crack outwards from the mouth: a bright line beside a dark one."""
    turn, length, steps = rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.16), 32
    kinks = np.repeat(rng.normal(0, 0.55, steps // 4), 4)
    heading = turn + rng.normal(0, 0.5) + kinks
    path = np.array(_point(MOUTH, turn))[:, None] + _walk(heading, length)
    near, part = view.near(*_point(MOUTH, turn), 1.5 * length)
    distance, place = _trace(part, path)
    shadow, _ = _trace(part, path + 0.009)
    strength = 0.09 * np.clip(0.5 + grain(rng, part, 30), 0.1, None) * (1.1 - place)
    changed = scene[near] * (1 - 0.55 * bell(shadow, 0.008))[:, None]
    changed = changed + (strength * bell(distance, 0.0045))[:, None]
    return _put(scene, near, np.minimum(distance, shadow) < 0.009, changed)


def _walk(heading: Array, length: float) -> Array:
    """Return the points (2, steps) of a line of this length that turns by `heading` (steps,)."""
    return np.cumsum(np.stack([np.cos(heading), np.sin(heading)]), axis=1) * (length / heading.size)


def _trace(view: View, path: Array) -> tuple[Array, Array]:
    """Return distance to a path (2, steps), and where along it (0..1) the nearest point is."""
    distance, place = np.full(view.x.shape, np.inf), np.zeros(view.x.shape)
    for index, (x, y) in enumerate(path.T):
        here = np.hypot(view.x - x, view.y - y)
        place = np.where(here < distance, index / path.shape[1], place)
        distance = np.minimum(here, distance)
    return distance, place


def _fibre(rng: Generator, view: View, x: float, y: float, length: float) -> tuple[Array, Bool]:
    """Return light (N,) and region (N,) of a curled thread."""
    bend = rng.normal(0, 2.0) + np.cumsum(rng.normal(0, 1.1, 48))
    path = _walk(rng.uniform(0, 2 * np.pi) + np.cumsum(bend) / 48, length)
    path += np.array([[x], [y]]) - path.mean(axis=1, keepdims=True)
    distance, place = _trace(view, path)
    width = rng.uniform(0.0045, 0.0075)
    sheen = 1.2 + 0.7 * np.sin(place * rng.uniform(10, 24))
    return bell(distance, width) * sheen, distance < 1.25 * width


def _lint(rng: Generator, view: View, x: float, y: float, size: float) -> tuple[Array, Bool]:
    """Return light (N,) and region (N,) of matted threads without a sharp outline."""
    u, v = _axes(view, x, y, rng.uniform(0, np.pi))
    body = 1 - np.hypot(u, v * rng.uniform(1.0, 1.8)) / size + 0.55 * grain(rng, view, 14)
    threads = np.zeros(u.shape)
    for lean in rng.uniform(0, np.pi, 3):
        along, across = _axes(view, x, y, lean)
        threads += 0.5 - np.abs(noise(rng, along * 22, across * 110, 400))
    return np.clip(body, 0, 0.6) * np.clip(0.8 + 1.2 * threads, 0.15, None), body > 0.08


def _drop(rng: Generator, view: View, x: float, y: float, size: float) -> tuple[Array, Bool]:
    """Return light (N,) and region (N,) of a drop: bright crescent, dark side, lamp."""
    u, v = _axes(view, x, y, rng.normal(2.7, 0.3))
    norm = np.hypot(u, v * rng.uniform(0.85, 1.2)) / size + 0.06 * grain(rng, view, 12)
    facing = u / np.maximum(np.hypot(u, v), 1e-6)  # cosine of the direction to the lamp
    crescent = bell(norm - 0.82, 0.16) * np.clip(0.3 - 0.9 * facing, -0.3, None)
    lamp = 1.6 * bell(norm - 0.55, 0.13) * bell(facing - 1, 0.10)
    return (0.12 + crescent + lamp) * step(norm, 1.0, 0.2), norm < 1.0
