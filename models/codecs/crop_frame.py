"""Where a person's box lies in the crop that a network sees, by the convention of its codec.

Pixel centers are whole numbers. The official HRNet counts a crop of w pixels as w long and puts
the box's center at w / 2; UDP (Huang et al., CVPR 2020) counts the gaps between the pixels.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CropFrame:
    """A crop's size, and what its lengths are counted in."""

    size: tuple[int, int]
    """Height and width, px."""
    align_corners: bool = False
    """True: from the first pixel's center to the last one's, w - 1; False: w pixels."""

    @property
    def span(self) -> tuple[float, float]:
        """The crop's length along x and y."""
        height, width = self.size
        return (width - 1.0, height - 1.0) if self.align_corners else (float(width), float(height))

    @property
    def center(self) -> tuple[float, float]:
        """x and y of the place at which the box's center lies."""
        across, down = self.span
        return across / 2, down / 2

    @property
    def zoom(self) -> tuple[float, float]:
        """How much larger along x and y it shows a person than a frame of w x h pixels does."""
        (height, width), (across, down) = self.size, self.span
        return across / width, down / height
