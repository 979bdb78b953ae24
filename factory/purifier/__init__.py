"""The purifier: a server-side system that removes adversarial noise with a deep image prior, without any training."""
