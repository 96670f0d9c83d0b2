"""What a person looks at: pictures of a run, and one page that shows what adaptive tokens did."""

from avit_jax.report.pictures import depth_map, draw_curves, draw_depth_histogram, draw_depth_maps, draw_run

__all__ = ["depth_map", "draw_curves", "draw_depth_histogram", "draw_depth_maps", "draw_run"]
