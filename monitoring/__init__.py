"""The monitoring room: metrics, drift detection, structured logs, and what Prometheus and Grafana load."""
