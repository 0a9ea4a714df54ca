"""Loading a trained model and generating text with it."""
