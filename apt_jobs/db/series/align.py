"""Put series of many jobs on one axis: a grid of at most so many points, and the mean of what lies in each.

Point `i` of the grid stands for what is beyond point `i - 1`, up to and including point `i`. Pure functions.
"""

from dataclasses import dataclass

import numpy as np

from apt_jobs.db.series.summaries import Floats, Integers


@dataclass(frozen=True, slots=True)
class Grid:
    """P points, `width` apart. Those in which nothing lies are no part of an answer."""

    origin: float
    width: float
    num_points: int
    last: float  # largest place: the last point is not beyond it

    def indices(self, places_R: Floats) -> Integers:
        """Return the point of each place. Places are finite and not before `origin`."""
        indices_R = np.ceil((places_R - self.origin) / self.width).astype(np.int64) - 1
        return np.clip(indices_R, 0, self.num_points - 1)

    def places(self) -> Floats:
        """Return where the points are."""
        places: Floats = self.origin + self.width * np.arange(1, self.num_points + 1, dtype=np.float64)
        places[-1] = self.last  # whatever was rounded
        return places


def grid_over(first: float, last: float, max_points: int, *, is_whole: bool) -> Grid:
    """Return a grid from `first` to `last`.

    Args:
        first: Smallest place.
        last: Largest place.
        max_points: Most points.
        is_whole: Places are whole numbers, as steps: so are the grid's.
    """
    if is_whole:
        num_places = int(last - first) + 1
        width = -(-num_places // max_points)
        return Grid(first - 1, width, -(-num_places // width), last)
    spacing = (last - first) / max_points
    return Grid(first, spacing, max_points, last) if spacing > 0.0 else Grid(first - 1.0, 1.0, 1, last)


def means_on(
    grid: Grid, num_jobs: int, jobs_R: Integers, places_R: Floats, values_R: Floats, weights_R: Integers
) -> tuple[Floats, Integers]:
    """Return the weighted mean of each job and point, and how many values it is of.

    Args:
        grid: The points.
        num_jobs: J.
        jobs_R: Index of the job of each value.
        places_R: Where each value lies; NaN: nobody knows, it is left out.
        values_R: Finite, or NaN: then so is the mean of its point.
        weights_R: Steps that each value stands for.

    Returns:
        Means and counts, J x P. Where the count is 0 the mean is 0.
    """
    known_R = np.isfinite(places_R) & (weights_R > 0)
    jobs_R, places_R, values_R, weights_R = jobs_R[known_R], places_R[known_R], values_R[known_R], weights_R[known_R]
    cells_R = jobs_R * grid.num_points + grid.indices(places_R)
    shape, num_cells = (num_jobs, grid.num_points), num_jobs * grid.num_points
    counts = np.bincount(cells_R, weights_R, num_cells)
    with np.errstate(over="ignore", invalid="ignore"):
        shares_R = weights_R / counts[cells_R]  # first: a sum of values near the end of the range is infinite
        means: Floats = np.bincount(cells_R, values_R * shares_R, num_cells).astype(np.float64)
    return means.reshape(shape), counts.astype(np.int64).reshape(shape)
