"""Visual tokens: where they stand, what they are worth, where on the image they lie, which to keep; drafts and scores.

Pure tensors and no hooks.
"""
