"""CKA while a network trains: for Lightning, for Hugging Face's Trainer, and for your own training loop."""

from cka_hooks.integrations.training import TrainingCKA

__all__ = ["TrainingCKA"]
