"""What the saved FLOPs bought in milliseconds."""

from gatedkernels.reporting.latency import density_for, latency_rows
from gatedkernels.reporting.plot import speedup_plot
from gatedkernels.reporting.report import Report, report
from gatedkernels.reporting.widths import width_costs, width_plot

__all__ = ["Report", "density_for", "latency_rows", "report", "speedup_plot", "width_costs", "width_plot"]
