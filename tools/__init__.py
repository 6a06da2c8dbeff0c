"""Programs that people run beside training: plan, plot, evaluate, adapters, small models."""
