"""A pair as a model of lmms-eval: `manifest` tells lmms-eval where it is, `model` is the model."""
