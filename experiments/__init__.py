"""The experiments of both papers, their statistics and pictures, and the measurements of speed and size."""
