"""Limits of the service, and the answer to a request that it refuses."""

from dataclasses import dataclass

# Above it Pillow refuses by itself (178 million), whatever the service would allow.
MOST_MEGAPIXELS = 170


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much may wait."""

    body_bytes: int = 16_000_000
    pixels: int = 50_000_000  # of one image
    images: int = 64  # of one request
    waiting: int = 64  # images per model that are accepted and not answered yet
    seconds: float = 30.0  # for one request, from its first byte to its answer


class Refusal(Exception):
    """A request that is answered with `status` and one line of text instead of a result."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Places:
    """Count the images of a model that are accepted and not answered yet. For one thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def take(self, count: int) -> bool:
        """Take places if there are as many; else take none and return False."""
        if self.taken + count > self.most:
            return False
        self.taken += count
        return True

    def give_back(self, count: int) -> None:
        """Free places again."""
        self.taken -= count
