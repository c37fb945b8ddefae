"""What a model is worth and costs: metrics, accounting, throughput, pictures."""
