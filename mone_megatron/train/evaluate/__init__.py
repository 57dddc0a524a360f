"""Tasks on the model that is being trained."""
