"""megatron_cm3leon: train CM3Leon, a decoder-only transformer over text and image tokens."""

__version__ = "0.1.0"
