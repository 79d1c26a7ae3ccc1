"""Training one configuration: what it is made of, the step, the loop, the scores."""
