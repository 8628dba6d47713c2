"""Turn runs in MLflow into a paper's tables, figures and a report.

The package knows the runs from MLflow only: it never imports the trainer, `sddlskd`.
"""
