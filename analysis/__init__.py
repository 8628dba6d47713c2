"""From runs in MLflow to a paper's tables, figures and a report. Reads MLflow alone; never imports sddlskd."""
