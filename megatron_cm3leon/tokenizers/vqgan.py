"""The network of the image tokenizer: a VQGAN whose weights have the names of taming-transformers.

    pixels [B, 3, H, W] -> encoder -> quant_conv -> nearest code of the codebook -> codes [B, h, w]
    codes [B, h, w] -> codebook -> post_quant_conv -> decoder -> pixels

The checkpoints of Make-A-Scene's successors share this layout (encoder.down.i.block.j, encoder.mid,
quantize.embedding, decoder.up.i ...); transformers calls the encoder half ChameleonVQVAE.
Two options keep the names but change the function, for small models whose codes must be easy to predict:
`norm: pixel` and `encoder_kernel: 1` make a code a function of its own patch of the image alone.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32  # as in taming-transformers
_KEYS = (
    "image_size", "codebook_size", "embed_dim", "latent_channels", "base_channels", "channel_multiplier",
    "num_res_blocks", "attn_resolutions", "mid_attention", "norm", "encoder_kernel", "quantizer",
)  # fmt: skip
"""The fields of config.json, in its order."""


@dataclass(frozen=True, kw_only=True)
class VQGANConfig:
    """Shape of a VQGAN. The defaults are the public 256-pixel model with 1,024 codes per image."""

    image_size: int = 256
    """Height and width of an image in pixels."""
    codebook_size: int = 8192
    """Codes, K."""
    embed_dim: int = 256
    """Width of a code."""
    latent_channels: int = 256
    """Channels between the encoder and quant_conv, and between post_quant_conv and the decoder."""
    base_channels: int = 128
    """Channels at full resolution."""
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 4)
    """Channels of each level as multiples of base_channels; each level after the first halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder level; a decoder level has one more."""
    attn_resolutions: tuple[int, ...] = ()
    """Resolutions (pixels) whose residual blocks are followed by attention."""
    mid_attention: bool = True
    """Attention between the two residual blocks at the lowest resolution."""
    norm: str = "group"
    """group: GroupNorm over channels and the whole image (taming); pixel: over the channels of one pixel."""
    encoder_kernel: int = 3
    """Kernel of the encoder's convolutions: 3 (taming), or 1, which with norm=pixel makes a code a function
    of its own patch of the image alone."""

    quantizer: str = "nearest"
    """nearest: the code nearest to the latent; logits: the largest of K outputs of a 1 x 1 convolution (taming's
    Gumbel quantizer)."""

    def __post_init__(self) -> None:
        for name in ("channel_multiplier", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("image_size", "codebook_size", "embed_dim", "latent_channels", "base_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"image tokenizer: {name} ({getattr(self, name)}) must be at least 1.")
        if not self.channel_multiplier or min(self.channel_multiplier) < 1 or self.num_res_blocks < 0:
            raise ValueError(
                f"image tokenizer: channel_multiplier ({list(self.channel_multiplier)}) must have one number of at "
                f"least 1 per level, and num_res_blocks ({self.num_res_blocks}) must not be negative."
            )
        if self.num_res_blocks == 0 and len(set(self.channel_multiplier)) > 1:
            raise ValueError(
                f"image tokenizer: channel_multiplier ({list(self.channel_multiplier)}) must not change if "
                f"num_res_blocks is 0, because residual blocks change the channels; repeat one number."
            )
        if self.norm not in ("group", "pixel"):
            raise ValueError(f"image tokenizer: norm ({self.norm!r}) must be group or pixel.")
        if self.quantizer not in ("nearest", "logits"):
            raise ValueError(f"image tokenizer: quantizer ({self.quantizer!r}) must be nearest or logits.")
        if self.encoder_kernel not in (1, 3):
            raise ValueError(f"image tokenizer: encoder_kernel ({self.encoder_kernel}) must be 1 or 3.")
        if self.norm == "group" and self.base_channels % NORM_GROUPS:
            raise ValueError(
                f"image tokenizer: base_channels ({self.base_channels}) must be a multiple of {NORM_GROUPS} with "
                f"norm=group; change it or use norm=pixel."
            )
        if self.image_size % self.downsample:
            raise ValueError(
                f"image tokenizer: image_size ({self.image_size}) must be a multiple of the down-sampling factor "
                f"({self.downsample} = 2 ** (levels - 1), levels from channel_multiplier)."
            )
        unreached = set(self.attn_resolutions) - set(self.resolutions)
        if unreached:
            raise ValueError(
                f"image tokenizer: attn_resolutions ({sorted(unreached)}) must be among the resolutions "
                f"{self.resolutions}."
            )

    @property
    def downsample(self) -> int:
        """Height and width of the patch of one image token, in pixels."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def resolutions(self) -> list[int]:
        """Image height and width in pixels at each level, the highest first."""
        return [self.image_size >> level for level in range(len(self.channel_multiplier))]

    def to_dict(self) -> dict:
        """The fields as config.json has them; the hash of the vocabulary covers them."""
        return {key: getattr(self, key) for key in _KEYS}

    @classmethod
    def from_dict(cls, values: dict) -> "VQGANConfig":
        """Read config.json's fields; unknown ones are an error, for they might change the codes."""
        values = {name: value for name, value in values.items() if name not in ("format", "type", "training")}
        unknown = values.keys() - set(_KEYS)
        if unknown:
            raise ValueError(f"image tokenizer: unknown fields {sorted(unknown)}; a newer version wrote them.")
        return cls(**values)


class PixelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of [B, C, H, W]: no pixel depends on its neighbors."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def build_norm(config: VQGANConfig, channels: int) -> nn.Module:
    if config.norm == "pixel":
        return PixelNorm(channels, eps=1e-6)
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


def build_conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """Convolution that keeps the resolution."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, config: VQGANConfig, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.norm1 = build_norm(config, inputs)
        self.conv1 = build_conv(inputs, outputs, kernel)
        self.norm2 = build_norm(config, outputs)
        self.conv2 = build_conv(outputs, outputs, kernel)
        if inputs != outputs:
            self.nin_shortcut = build_conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """One head of attention over all pixels."""

    def __init__(self, config: VQGANConfig, channels: int) -> None:
        super().__init__()
        self.norm = build_norm(config, channels)
        self.q, self.k, self.v, self.proj_out = (build_conv(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        q, k, v = (layer(hidden).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Downsample(nn.Module):
    """Half the resolution: 3 x 3 pixels into one (taming), or 2 x 2, which do not overlap, with kernel 1."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.overlap = kernel // 2
        self.conv = nn.Conv2d(channels, channels, 2 + self.overlap, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, self.overlap, 0, self.overlap)))


class Upsample(nn.Module):
    """Twice the resolution, nearest pixel, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = build_conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, config: VQGANConfig, channels: int, kernel: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(config, channels, channels, kernel)
        self.attn_1 = AttentionBlock(config, channels) if config.mid_attention else nn.Identity()
        self.block_2 = ResidualBlock(config, channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks of one resolution (`size` pixels), each with attention if configured, then a resampling."""

    downsample: Downsample
    """In the encoder, on all levels but the lowest."""
    upsample: Upsample
    """In the decoder, on all levels but the highest."""

    def __init__(self, config: VQGANConfig, inputs: int, outputs: int, blocks: int, kernel: int, size: int) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.block.append(ResidualBlock(config, inputs, outputs, kernel))
            inputs = outputs
            if size in config.attn_resolutions:
                self.attn.append(AttentionBlock(config, outputs))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        if hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


class Quantizer(nn.Module):
    """The codebook, and with quantizer=logits the convolution that selects codes."""

    proj: nn.Conv2d

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.embed_dim)
        if config.quantizer == "logits":
            self.proj = build_conv(config.embed_dim, config.codebook_size, 1)


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to features [B, latent_channels, h, w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        kernel = config.encoder_kernel
        channels = [config.base_channels * multiplier for multiplier in (1, *config.channel_multiplier)]
        channels[0] = config.base_channels if config.num_res_blocks else channels[1]
        self.conv_in = build_conv(3, channels[0], kernel)
        self.down = nn.ModuleList()
        for number, size in enumerate(config.resolutions):
            before, after = channels[number : number + 2]
            level = Level(config, before, after, config.num_res_blocks, kernel, size)
            if size != config.resolutions[-1]:
                level.downsample = Downsample(after, kernel)
            self.down.append(level)
        self.mid = Middle(config, channels[-1], kernel)
        self.norm_out = build_norm(config, channels[-1])
        self.conv_out = build_conv(channels[-1], config.latent_channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features [B, latent_channels, h, w] to pixels [B, 3, H, W]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        channels = [config.base_channels * multiplier for multiplier in config.channel_multiplier]
        self.conv_in = build_conv(config.latent_channels, channels[-1])
        self.mid = Middle(config, channels[-1], 3)
        levels, before = [], channels[-1]
        for size, after in zip(reversed(config.resolutions), reversed(channels), strict=True):
            level = Level(config, before, after, config.num_res_blocks + 1, 3, size)
            if size != config.image_size:
                level.upsample = Upsample(after)
            levels.append(level)
            before = after
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the highest resolution
        self.norm_out = build_norm(config, before)
        self.conv_out = build_conv(before, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """The network; latents and codes keep the grid: latents [B, embed_dim, h, w], codes [B, h, w]."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = build_conv(config.latent_channels, config.embed_dim, 1)
        self.post_quant_conv = build_conv(config.embed_dim, config.latent_channels, 1)
        self.quantize = Quantizer(config)

    @property
    def codebook(self) -> Tensor:
        """The codes' vectors [codebook_size, embed_dim]."""
        return self.quantize.embedding.weight

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels to latents, not yet quantized."""
        return self.quant_conv(self.encoder(pixels))

    def find_codes(self, latents: Tensor) -> Tensor:
        """Code of each latent: the nearest by squared distance, or the one with the largest logit."""
        if self.config.quantizer == "logits":
            return self.quantize.proj(latents).argmax(1)
        flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        codes = find_nearest(flat, self.codebook)
        return codes.view(latents.shape[0], *latents.shape[2:])

    def look_up(self, codes: Tensor) -> Tensor:
        """Codes to quantized latents."""
        return self.quantize.embedding(codes).permute(0, 3, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Quantized latents to pixels, not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def find_nearest(vectors_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Row of the codebook nearest to each vector, in fp32."""
    vectors_ND, codebook_KD = vectors_ND.float(), codebook_KD.float()
    distances = (codebook_KD**2).sum(1) - 2 * vectors_ND @ codebook_KD.T  # + |vector|^2, the same for all
    return distances.argmin(1)
