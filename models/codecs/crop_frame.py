"""The frame of a crop: where a person's box lies in it, by the convention of the codec.

Pixel centers are whole numbers. In the official HRNet a crop of w pixels has length w, and the
box's center is at w / 2; in UDP (Huang et al., CVPR 2020) its length is w - 1, the number of gaps
between pixels.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CropFrame:
    """A crop's size, and the convention for its length."""

    size: tuple[int, int]
    """Height and width, px."""
    align_corners: bool = False
    """True: the length is w - 1, from the first pixel's center to the last one's; False: w."""

    @property
    def span(self) -> tuple[float, float]:
        """The crop's length along x and y, px."""
        height, width = self.size
        return (width - 1.0, height - 1.0) if self.align_corners else (float(width), float(height))

    @property
    def center(self) -> tuple[float, float]:
        """x and y of the box's center."""
        length_x, length_y = self.span
        return length_x / 2, length_y / 2

    @property
    def zoom(self) -> tuple[float, float]:
        """Magnification along x and y, relative to a frame of length w x h."""
        (height, width), (length_x, length_y) = self.size, self.span
        return length_x / width, length_y / height
