"""`mini-resampler`: a vision-language model of the shape of MiniCPM-V and Megrez, in one file that lies beside its weights.

A SigLIP encoder reads an image at its own size and aspect ratio. A perceiver resampler (arXiv:2408.01800) turns its patches,
however many, into a fixed number of visual tokens: learned queries attend to the patches, once. A Llama-style language model
answers. The resampler attends through `nn.MultiheadAttention`, and its last matrix is a bare parameter, as in those models:
both are what quantizers stumble over (notebook 40).
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DynamicCache,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.siglip.modeling_siglip import SiglipEncoder


class MiniResamplerConfig(PreTrainedConfig):
    model_type = "mini_resampler"
    sub_configs: ClassVar = {"vision_config": SiglipVisionConfig, "text_config": LlamaConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    queries_per_side: int = 8  # its square is how many visual tokens an image becomes
    resampler_heads: int = 2
    image_token_id: int = 3
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for name, kind in self.sub_configs.items():
            given = getattr(self, name)
            setattr(self, name, given if isinstance(given, PreTrainedConfig) else kind(**(given or {})))
        super().__post_init__(**kwargs)


def places(patch_mask: Tensor) -> Tensor:
    """Where the middle of each patch lies, (B, R * C, 2): x and y as a share of the image's real width and height.
    `patch_mask` (B, R, C) is true where there is no padding; that fills whole rows and columns behind the image."""
    axes = []
    for axis in (2, 1):  # x along the columns, y along the rows
        real = patch_mask.any(3 - axis).sum(1, keepdim=True)  # (B, 1): so many columns, or rows
        axes.append((torch.arange(patch_mask.shape[axis], device=patch_mask.device) + 0.5) / real)
    x, y = axes
    grid = torch.stack([x[:, None, :].expand(patch_mask.shape), y[:, :, None].expand(patch_mask.shape)], dim=-1)
    return grid.flatten(1, 2).clamp(max=1)


def sincos(at: Tensor, width: int) -> Tensor:
    """2-D sine-cosine position vectors (..., width) of places (..., 2): x and y side by side at each frequency, so that every
    head of the resampler sees both."""
    frequency = 16 / 10 ** (torch.arange(width // 4, device=at.device) / (width // 4))  # radians across the image
    angle = at[..., None, :] * frequency[:, None]  # (..., width / 4, 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class MiniResamplerPreTrainedModel(PreTrainedModel):
    config: MiniResamplerConfig
    config_class = MiniResamplerConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    _no_split_modules: ClassVar = ["SiglipEncoderLayer", "LlamaDecoderLayer", "Resampler"]
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True


class VisionEncoder(MiniResamplerPreTrainedModel):
    """SigLIP at an image's own resolution: each patch takes the nearest of a square grid of learned positions (NaViT)."""

    config: SiglipVisionConfig
    config_class = SiglipVisionConfig

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        width, self.patch_size = config.hidden_size, config.patch_size
        self.side = config.image_size // config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(self.side**2, width)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    def forward(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """pixel_values (B, 3, H, W) in [-1, 1]; features (B, R * C, width)."""
        patches = self.patch_embedding(pixel_values)
        patch_mask = self.whole(patches) if patch_mask is None else patch_mask
        x, y = (places(patch_mask) * self.side).long().clamp(max=self.side - 1).unbind(-1)
        hidden = patches.flatten(2).transpose(1, 2) + self.position_embedding(y * self.side + x)
        hidden = self.encoder(hidden, attention_mask=attention_bias(patch_mask, hidden.dtype)).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=self.post_layernorm(hidden))

    @staticmethod
    def whole(patches: Tensor) -> Tensor:
        return torch.ones(len(patches), *patches.shape[-2:], dtype=torch.bool, device=patches.device)


def attention_bias(patch_mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, (B, 1, 1, R * C): padding gets nothing. None without padding."""
    if patch_mask.all():
        return None
    return torch.zeros_like(patch_mask, dtype=dtype).masked_fill(~patch_mask, torch.finfo(dtype).min).flatten(1)[:, None, None]


class Resampler(nn.Module):
    """Learned queries attend to an image's patches: (B, N, vision width) to (B, queries, width), whatever N is."""

    def __init__(self, config: MiniResamplerConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.query = nn.Parameter(torch.randn(config.queries_per_side**2, width) * 0.02)
        self.kv_proj = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.resampler_heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def forward(self, features: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """`patch_mask` (B, R, C): which patches are real; without it they are those of a square image without padding."""
        if patch_mask is None:
            side = int(features.shape[1] ** 0.5)
            patch_mask = torch.ones(len(features), side, side, dtype=torch.bool, device=features.device)
        values = self.ln_kv(self.kv_proj(features))
        keys = values + sincos(places(patch_mask), values.shape[-1]).to(values.dtype)
        queries = self.ln_q(self.query).expand(len(features), -1, -1)
        padding = None if patch_mask.all() else ~patch_mask.flatten(1)
        found = self.attn(queries, keys, values, key_padding_mask=padding)[0]
        return self.ln_post(found) @ self.proj


class MiniResamplerModel(MiniResamplerPreTrainedModel):
    def __init__(self, config: MiniResamplerConfig):
        super().__init__(config)
        self.vision_model = VisionEncoder._from_config(config.vision_config)
        self.resampler = Resampler(config)
        self.text_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text_model.get_input_embeddings()

    def get_image_features(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **_
    ) -> BaseModelOutputWithPooling:
        """pixel_values (B, images, 3, H, W), pixel_attention_mask (B, images, H, W), as Idefics2's processor makes them; images
        that only fill up a batch are all zeros. `pooler_output`: the visual tokens of the others, (images * queries, width)."""
        pixels = pixel_values.flatten(0, 1).to(self.dtype)
        real = pixels.flatten(1).any(1)
        pixels, size = pixels[real], self.config.vision_config.patch_size
        seen = torch.ones_like(pixels[:, 0], dtype=torch.bool)
        if pixel_attention_mask is not None:
            seen = pixel_attention_mask.flatten(0, 1)[real].bool()
        rows, columns = (n // size for n in seen.shape[1:])
        patches = seen[:, : rows * size, : columns * size].unflatten(2, (columns, size)).unflatten(1, (rows, size))
        patch_mask = patches.all(4).all(2)  # a patch cut off by the image's edge is none, as without padding
        features = self.vision_model(pixels, patch_mask).last_hidden_state
        tokens = self.resampler(features, patch_mask).flatten(0, 1)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens)

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, pixel_values=None, pixel_attention_mask=None, **kwargs
    ):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            visual = self.get_image_features(pixel_values, pixel_attention_mask).pooler_output
            at = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            if at.sum() != visual.numel():
                tokens = int(at.sum()) // visual.shape[-1]
                raise ValueError(f"Image features and image tokens do not match, tokens: {tokens}, features: {len(visual)}")
            inputs_embeds = inputs_embeds.masked_scatter(at, visual.to(inputs_embeds.dtype))
        return self.text_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)


class MiniResamplerForConditionalGeneration(MiniResamplerPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.text_model.embed_tokens.weight"}

    def __init__(self, config: MiniResamplerConfig):
        super().__init__(config)
        self.model = MiniResamplerModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def get_image_features(self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, **kwargs):
        return self.model.get_image_features(pixel_values, pixel_attention_mask, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        pixel_values=None,
        pixel_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        images = {"pixel_values": pixel_values, "pixel_attention_mask": pixel_attention_mask}
        kwargs |= {"past_key_values": past_key_values, "use_cache": use_cache}
        out = self.model(input_ids, attention_mask, **images, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.text_config.vocab_size)
        cache = out.past_key_values
        return CausalLMOutputWithPast(loss, logits, cache, out.hidden_states, out.attentions)
