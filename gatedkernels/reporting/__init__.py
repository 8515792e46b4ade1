"""What the saved FLOPs bought in milliseconds."""

from gatedkernels.reporting.latency import density_for, latency_rows
from gatedkernels.reporting.plot import speedup_plot
from gatedkernels.reporting.report import Report, report

__all__ = ["Report", "density_for", "latency_rows", "report", "speedup_plot"]
