"""The clean bottle mouth of the synthetic set, and the camera that looks at it."""

from dataclasses import dataclass, fields

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

# Everything is computed in float64: the last bit of sin() or exp() differs between processors, and
# only in double precision is that too small to ever flip a rounded pixel.
Array = NDArray[np.float64]
Bool = NDArray[np.bool_]
# Shapes: H W the fine grid, SIZE * OVERSAMPLING each; N chosen pixels; 3 linear RGB.

SIZE = 320  # pixels of a finished picture
OVERSAMPLING = 2
LEVELS = 127  # steps of the converter; the rounding it causes is hidden by the noise
MOUTH, LIP = 0.455, 0.80  # radii of the hole and of the lip, in radii of the bottle

# Profiles: radius, then red, green, blue as 8-bit sRGB. The three depths shift against each other
# when the bottle stands off the optical axis.
SHOULDER = """
0.780  58  57  66   0.820  84  80  82   0.845  70  68  74   0.875  42  44  52
0.905  74  73  80   0.925 142 136 138   0.945  78  76  84   0.975  44  46  54
0.992  66  66  72   1.010 205 206 208   1.030 262 262 262   1.050 298 298 298
"""
RIM = """
0.445  34  22  22   0.458  78  48  42   0.470  40  40  42   0.480  62  68  66
0.520  44  54  52   0.560  50  58  56   0.575  92 102 100   0.590  62  68  74
0.610  98 100 110   0.622  66  68  76   0.640  80  80  90   0.660  68  66  74
0.700  66  66  76   0.730  90  88  96   0.745  66  66  74   0.790  72  70  78
"""
HOLE = "0.00 40 39 48   0.25 36 34 44   0.40 30 28 38   0.46 25 22 32"


@dataclass(frozen=True)
class View:
    """Hold where each pixel lies on the bottle; arrays (H, W), or (N,) for chosen pixels."""

    x: Array  # radii of the bottle from its axis
    y: Array
    angle: Array  # radians, turns with the bottle
    base: Array  # radius at the depth of the shoulder
    rim: Array  # radius at the depth of the lip, nearest to the camera
    floor: Array  # radius at the bottom inside
    facing: Array  # radians between this direction and the lamp's, -pi..pi

    def near(self, x: float, y: float, reach: float) -> tuple[Bool, "View"]:
        """Return which pixels (H, W) are within `reach` of a point, and the view of those alone."""
        chosen = np.hypot(self.x - x, self.y - y) < reach
        return chosen, self.pick(chosen)

    def pick(self, chosen: Bool) -> "View":
        """Return the view of the chosen pixels alone, arrays (N,)."""
        return View(*(getattr(self, field.name)[chosen] for field in fields(View)))


def look(rng: Generator) -> View:
    """Place a bottle under the camera: small shift, tilt and zoom, any turn about its axis."""
    half = SIZE * OVERSAMPLING / 2
    scale = half * 0.885 * rng.uniform(0.985, 1.015)
    shift, tilt = rng.uniform(-0.022, 0.022, 2), rng.uniform(-0.016, 0.016, 2)
    grid = (np.arange(2 * half) + 0.5 - half) / scale
    x, y = np.broadcast_arrays(grid[None, :] - shift[0], grid[:, None] - shift[1])
    direction = np.arctan2(y, x)
    lamp = np.radians(155) + rng.normal(0, 0.12)
    return View(
        x=x,
        y=y,
        angle=np.mod(direction + rng.uniform(0, 2 * np.pi), 2 * np.pi),
        base=np.hypot(x, y),
        rim=np.hypot(x - tilt[0], y - tilt[1]),
        floor=np.hypot(x + 2 * tilt[0], y + 2 * tilt[1]),
        facing=_wrap(direction - lamp),
    )


def bottle(rng: Generator, view: View) -> Array:
    """Return a bottle without defects, (H, W, 3) linear light, white = 1."""
    scene = _glass(rng, view)
    for layer in (_amber, _hairlines, _depths, _dust, _highlights):
        scene = layer(rng, view, scene)
    return scene


def photograph(rng: Generator, scene: Array) -> NDArray[np.uint8]:
    """Return the picture (SIZE, SIZE, 3) of a scene (H, W, 3): lamp, optics, noise, gamma."""
    grid = np.linspace(-1, 1, scene.shape[0])
    slope = rng.uniform(-0.05, 0.05, 2)
    light = 1 + slope[0] * grid[None, :] + slope[1] * grid[:, None]
    light *= 1 - 0.05 * (grid[None, :] ** 2 + grid[:, None] ** 2)
    tint = 1 + rng.normal(0, 0.012, 3)
    scene = scene * (light * rng.uniform(0.92, 1.08))[..., None] * tint
    sharp = shrink(_blur(scene, OVERSAMPLING * rng.uniform(0.36, 0.5)))
    scene = 0.985 * sharp + 0.015 * _blur(sharp, 6.0)  # stray light around bright parts
    grain = rng.normal(0, 1, (SIZE, SIZE, 1)) + 0.15 * rng.normal(0, 1, scene.shape)
    scene = scene + grain * np.sqrt(2.5e-7 + 1e-5 * np.clip(scene, 0, 1))
    counts = np.rint(np.power(np.clip(scene, 0, 1), 1 / 2.2) * LEVELS)
    return np.rint(counts * (255 / LEVELS)).astype(np.uint8)


def shrink(field: Array) -> Array:
    """Average (H, W, ...) over the fine pixels of each finished pixel."""
    blocks = field.reshape(SIZE, OVERSAMPLING, SIZE, OVERSAMPLING, *field.shape[2:])
    return blocks.mean(axis=(1, 3))


def linear(level: float | Array) -> Array:
    """Return linear light (white = 1) of 8-bit levels."""
    return np.power(np.asarray(level, np.float64) / 255.0, 2.2)


def step(radius: Array, edge: float, width: float) -> Array:
    """Return 1 inside `edge`, 0 outside, with a smooth transition of `width`."""
    t = np.clip((edge - radius) / width + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def bell(distance: Array, width: float | Array) -> Array:
    """Return a bell curve of `distance`, 1 at 0 and 1/e at `width`."""
    return np.exp(-np.square(distance / width))


def blend(scene: Array, colour: Array, weight: Array) -> Array:
    """Lay `colour` over `scene` (..., 3) with opacity `weight` (...)."""
    return scene + (colour - scene) * weight[..., None]


def noise(rng: Generator, u: Array, v: Array, columns: int) -> Array:
    """Return smooth noise in -1..1 at lattice coordinates (u, v); u repeats after `columns`."""
    column, row = np.floor(u), np.floor(v)
    a, b = u - column, v - row
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    row = (row - row.min()).astype(np.intp)
    lattice = rng.uniform(-1, 1, (int(row.max()) + 2, columns))
    left = np.mod(column, columns).astype(np.intp)
    right = np.where(left == columns - 1, 0, left + 1)
    top, bottom = row * columns, row * columns + columns
    lattice = lattice.ravel()
    over = lattice[top + left] * (1 - a) + lattice[top + right] * a
    under = lattice[bottom + left] * (1 - a) + lattice[bottom + right] * a
    return over * (1 - b) + under * b


def grain(rng: Generator, view: View, fineness: float) -> Array:
    """Return noise in -1..1 with `fineness` cells per radius of the bottle."""
    return noise(rng, view.x * fineness, view.y * fineness, int(4 * fineness) + 2)


def hole(view: View) -> Array:
    """Return the dark inside of the bottle, (..., 3)."""
    return _profile(HOLE, view.floor)


def _wrap(angle: Array) -> Array:
    return np.mod(angle + np.pi, 2 * np.pi) - np.pi


def _blur(scene: Array, sigma: float) -> Array:
    return cv2.GaussianBlur(scene, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def _ripple(rng: Generator, view: View, radius: Array, around: int, across: float) -> Array:
    """Return noise drawn along the glass: `around` cells per turn, `across` per radius."""
    return noise(rng, view.angle * (around / (2 * np.pi)), radius * across, around)


def _profile(table: str, radius: Array) -> Array:
    knots = np.array(table.split(), np.float64).reshape(-1, 4)
    colours = [np.interp(radius, knots[:, 0], linear(knots[:, channel])) for channel in (1, 2, 3)]
    return np.stack(colours, axis=-1)


def _glass(rng: Generator, view: View) -> Array:
    warp = 0.004 * _ripple(rng, view, view.base, 5, 1.0)
    scene = _profile(SHOULDER, view.base + 0.5 * warp)
    shade = 0.12 * _ripple(rng, view, view.base, 9, 14.0) + 0.22 * np.cos(2 * view.facing - 0.6)
    scene *= np.exp(shade * (view.base < 0.99))[..., None]
    rim = _profile(RIM, view.rim + warp)
    streaks = _ripple(rng, view, view.rim + warp, 40, 70.0)
    mottle = _ripple(rng, view, view.rim, 230, 95.0) * bell(view.rim - 0.518, 0.035)
    rim *= np.exp(0.16 * streaks + 0.75 * mottle)[..., None]
    scene = blend(scene, rim, step(view.rim, LIP, 0.02))
    return blend(scene, hole(view), step(view.rim + 0.6 * warp, MOUTH, 0.008))


def _amber(rng: Generator, view: View, scene: Array) -> Array:
    """Add the light refracted through brown glass: a ring torn into uneven strokes."""
    chosen = (view.rim > 0.44) & (view.rim < 0.75)
    part, scene = view.pick(chosen), scene.copy()
    radius = part.rim + 0.012 * _ripple(rng, part, part.rim, 7, 0.5)
    ragged = _ripple(rng, part, radius, 34, 45.0) + 0.6 * _ripple(rng, part, radius, 90, 90.0)
    presence = np.clip(0.62 + 0.9 * _ripple(rng, part, radius, 6, 2.0) + 0.45 * ragged, 0, 1)
    band = bell(radius - 0.682, 0.013 + 0.006 * np.cos(part.facing - 2.0))
    colour = linear(np.array([176.0, 98.0, 60.0])) * np.exp(0.5 * ragged)[..., None]
    inner = bell(part.rim - 0.459, 0.005) * (0.25 + 0.3 * ragged + 0.15 * np.cos(part.facing))
    ring = blend(scene[chosen], linear(np.array([138.0, 76.0, 60.0])), np.clip(inner, 0, 1))
    scene[chosen] = blend(ring, colour, 0.9 * presence * band)
    return scene


def _hairlines(rng: Generator, view: View, scene: Array) -> Array:
    """Add the thin bright edges of the moulded steps and the mould seam."""
    seam = bell(_wrap(2 * view.angle) / 2, 0.006) * (view.base > 0.70) * (view.base < 0.93)
    scene = scene * (1 - 0.25 * seam[..., None])
    lines = ((0.50, 0.02), (0.60, 0.05), (0.632, 0.035), (0.715, 0.04), (0.765, 0.03))
    for radius, strength in lines:
        chosen = np.abs(view.rim - radius) < 0.03
        part = view.pick(chosen)
        wander = 0.007 * _ripple(rng, part, part.rim, 4, 0.1)
        fade = np.clip(0.4 + 0.8 * _ripple(rng, part, part.rim, 11, 0.1), 0, None)
        lamp = 1 + 0.7 * np.cos(part.facing)
        line = bell(part.rim - radius - wander - rng.normal(0, 0.002), 0.0035)
        scene[chosen] += (strength * fade * lamp * line)[:, None]
    return scene


def _highlights(rng: Generator, view: View, scene: Array) -> Array:
    """Add the specular arcs (radius, radians from the lamp, half length, power)."""
    arcs = (
        (0.615, 0.0, 0.16, 1.5),
        (0.655, -0.05, 0.10, 0.9),
        (0.577, 2.5, 0.28, 0.22),
        (0.690, 2.75, 0.13, 0.9),
        (0.737, 0.25, 0.30, 0.20),
        (0.925, 0.3, 0.7, 0.12),
    )
    scene = scene.copy()
    for radius, where, length, power in arcs:
        blurred = radius > LIP  # the shoulder is out of focus
        chosen = np.abs(view.rim - radius) < 0.08
        part = view.pick(chosen)
        where, power = where + rng.normal(0, 0.05), power * np.exp(rng.normal(0, 0.25))
        along = bell(_wrap(part.facing - where), length * rng.uniform(0.8, 1.2))
        broken = np.clip(0.25 + 1.1 * _ripple(rng, part, part.rim, 70, 110.0), 0, None)
        arc = along * bell(part.rim - radius, 0.02 if blurred else 0.010)
        glint = power * arc * (1.0 if blurred else broken)
        scene[chosen] += glint[:, None] * np.array([1.0, 0.96, 0.82])
    return scene


def _depths(rng: Generator, view: View, scene: Array) -> Array:
    """Add what shines faintly inside: a glow from below and ghosts of the lens."""
    inside = step(view.rim, MOUTH, 0.02)
    for size, power in ((0.17, 0.013), (0.08, 0.008), (0.05, 0.008)):
        x, y = rng.normal(0, 0.13, 2)
        distance = np.hypot(view.x - x, view.y - y)
        glow = power * rng.uniform(0.1, 1.3) * bell(distance, size * rng.uniform(0.7, 1.6))
        scene = scene + (glow * inside)[..., None] * np.array([1.0, 0.98, 1.05])
    return scene * (1 + 0.15 * grain(rng, view, 9) * inside)[..., None]


def _dust(rng: Generator, view: View, scene: Array) -> Array:
    """Add the specks that every clean bottle has."""
    scene = scene.copy()
    for _ in range(rng.poisson(7)):
        turn, distance = rng.uniform(0, 2 * np.pi), 0.93 * np.sqrt(rng.uniform(0, 1))
        x, y = distance * np.cos(turn), distance * np.sin(turn)
        lean, size, longer = rng.uniform(0, np.pi), rng.uniform(0.0025, 0.007), rng.uniform(0, 1.5)
        near, part = view.near(x, y, 0.15)
        dx, dy = part.x - x, part.y - y
        along = (dx * np.cos(lean) + dy * np.sin(lean)) / (1 + longer)
        speck = bell(np.hypot(along, dy * np.cos(lean) - dx * np.sin(lean)), size)
        scene[near] += (rng.uniform(0.005, 0.08) * speck)[:, None]
    return scene
