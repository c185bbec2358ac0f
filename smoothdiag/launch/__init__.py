"""Launch: the first steps of a training script, and what they tell about its clipping and its rate."""
