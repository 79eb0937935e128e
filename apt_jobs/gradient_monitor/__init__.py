"""What outsiders import to watch gradients: `GradientMonitor` and callbacks. It needs neither service nor trainer."""

from apt_jobs.gradient_monitor.monitor import GradientMonitor

__all__ = ["GradientMonitor"]
