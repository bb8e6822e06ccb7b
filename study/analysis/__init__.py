"""Tables and plots of a study's results.

tables                finalists, winner and front as tables
figures               colors and frame of all plots
plots                 curves, Pareto front and AP plots
parallel_coordinates  trials as lines over parameters
importance            importance of each parameter
"""
