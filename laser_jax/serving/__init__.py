"""From a trained run to answers: export a model, rank with it."""
