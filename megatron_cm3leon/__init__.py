"""megatron_cm3leon: train CM3Leon, a decoder-only transformer over text and image tokens."""

from megatron_cm3leon.common.version import __version__ as __version__
