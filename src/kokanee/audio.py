"""The audio branch: mel chunks -> Whisper encoder -> window-level Q-Former -> audio tokens.

Every chunk (30 s in the published models) is encoded whole, cut into windows of half a second, and each window is
read by a Q-Former whose learnt queries become the window's audio tokens. Silence that fills up the last chunk is
encoded like any other sound, as in training.

Axes: C chunks, M mel bins, F mel frames (100 a second), S encoder states (50 a second), W windows of a chunk,
K states of a window, Q queries, D width of the encoder or Q-Former, H width of the language model.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.whisper.configuration_whisper import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from kokanee.errors import KokaneeError

STATES_PER_S = 50
MEL_FRAMES_PER_S = 100
CHUNKS_AT_ONCE = 16  # 8 minutes of sound: the states of all chunks of a film would not fit into memory


def window_states(seconds: float, what: str) -> int:
    """How many encoder states `seconds` cover, rounded; at least one, else `KokaneeError`."""
    states = round(seconds * STATES_PER_S)
    if states < 1:
        raise KokaneeError(
            f"{what} is {seconds} s, but the encoder has {STATES_PER_S} states a second. Give at least 0.02 s."
        )
    return states


def tokens_per_chunk(n_states: int, window_s: float, stride_s: float, n_queries: int) -> int:
    """Audio tokens of one chunk of `n_states` encoder states: windows that fit whole, times queries."""
    window = window_states(window_s, "window_s")
    stride = window_states(stride_s, "stride_s")
    if window > n_states:
        raise KokaneeError(
            f"window_s is {window_s} s, but a chunk is only {n_states / STATES_PER_S:g} s long. "
            "Give a shorter window, or a larger max_source_positions."
        )
    return ((n_states - window) // stride + 1) * n_queries


class AudioBranch(nn.Module):
    """Whisper encoder, Q-Former over windows, projection to the language model's width (paper, section 3.1).

    `forward` takes log-mel chunks (C, M, F) with F = 2 * max_source_positions, any float type, and returns audio
    tokens (C, tokens_per_chunk, H) in the type of the weights.
    """

    def __init__(
        self,
        audio_config: WhisperConfig,
        qformer_config: Blip2QFormerConfig,
        out_width: int,
        *,
        window_s: float = 0.5,
        stride_s: float = 0.5,
        n_queries: int = 1,
    ) -> None:
        super().__init__()
        if qformer_config.encoder_hidden_size != audio_config.d_model:
            raise KokaneeError(
                f"qformer_config.encoder_hidden_size is {qformer_config.encoder_hidden_size}, but the audio encoder's "
                f"d_model is {audio_config.d_model}. Give both the same number."
            )
        if "flash" in (qformer_config._attn_implementation or ""):
            qformer_config._attn_implementation = "sdpa"  # transformers' Q-Former has no flash attention
        self.window = window_states(window_s, "window_s")
        self.stride = window_states(stride_s, "stride_s")
        self.tokens_per_chunk = tokens_per_chunk(audio_config.max_source_positions, window_s, stride_s, n_queries)
        self.initializer_range = qformer_config.initializer_range
        self.encoder = WhisperEncoder._from_config(audio_config)
        self.qformer = Blip2QFormerModel._from_config(qformer_config)
        self.queries = nn.Parameter(torch.randn(1, n_queries, qformer_config.hidden_size) * self.initializer_range)
        self.projection = nn.Linear(qformer_config.hidden_size, out_width)

    def encode(self, input_features_CMF: torch.Tensor) -> torch.Tensor:
        """Mel chunks -> encoder states (C, S, D), S = max_source_positions."""
        expected = (self.encoder.num_mel_bins, 2 * self.encoder.max_source_positions)
        if input_features_CMF.ndim != 3 or tuple(input_features_CMF.shape[1:]) != expected:
            raise KokaneeError(
                f"input_features have shape {tuple(input_features_CMF.shape)}, but this model hears chunks of "
                f"{expected[0]} mel bins x {expected[1]} frames. Prepare the sound with the model's own processor."
            )
        return self.encoder(input_features_CMF.to(self.encoder.conv1.weight.dtype)).last_hidden_state

    def align(self, states_CSD: torch.Tensor) -> torch.Tensor:
        """The aligner: encoder states -> audio tokens (C, tokens_per_chunk, H)."""
        windows_NKD = states_CSD.unfold(1, self.window, self.stride).transpose(2, 3).flatten(0, 1)
        queries_NQD = self.queries.expand(windows_NKD.shape[0], -1, -1)
        read_NQD = self.qformer(query_embeds=queries_NQD, encoder_hidden_states=windows_NKD).last_hidden_state
        return self.projection(read_NQD).reshape(states_CSD.shape[0], -1, self.projection.out_features)

    def forward(self, input_features_CMF: torch.Tensor) -> torch.Tensor:
        """Mel chunks -> audio tokens (C, tokens_per_chunk, H); of long sounds some chunks at a time."""
        parts = input_features_CMF.split(CHUNKS_AT_ONCE)
        return torch.cat([self.align(self.encode(part)) for part in parts])
