"""Turn runs in MLflow into a paper's tables, figures and a report.

The package reads MLflow only and never imports sddlskd.
"""
