"""Where an ablation's report still looks for its table."""

from distill.report.tables import markdown_table

__all__ = ["markdown_table"]
