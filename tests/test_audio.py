from __future__ import annotations

import pytest
import torch

from kokanee import audio as audio_module
from kokanee.audio import AudioBranch, tokens_per_chunk
from kokanee.errors import KokaneeError
from tiny import tiny_config

CHUNK = (16, 200)


def branch(**changes) -> AudioBranch:
    torch.manual_seed(0)
    config = tiny_config()
    made = AudioBranch(config.audio_config, config.qformer_config, 24, **changes).eval()
    for weight in made.parameters():
        weight.data.mul_(4)
    return made


@pytest.mark.parametrize(
    ("n_states", "window_s", "stride_s", "n_queries", "expected"),
    [(1500, 0.5, 0.5, 1, 60), (400, 0.5, 0.5, 1, 16), (1500, 0.33, 0.33, 1, 93), (100, 1.0, 0.5, 2, 6)],
)
def test_a_chunk_has_a_token_for_every_window_that_fits_whole(n_states, window_s, stride_s, n_queries, expected):
    assert tokens_per_chunk(n_states, window_s, stride_s, n_queries) == expected


@pytest.mark.parametrize(("window_s", "stride_s", "n_queries"), [(0.5, 0.5, 1), (1.0, 0.5, 1), (0.5, 0.5, 3)])
def test_the_branch_makes_as_many_tokens_as_announced(window_s, stride_s, n_queries):
    audio = branch(window_s=window_s, stride_s=stride_s, n_queries=n_queries)
    tokens = audio(torch.randn(2, *CHUNK))
    assert tokens.shape == (2, audio.tokens_per_chunk, 24)
    assert audio.tokens_per_chunk == tokens_per_chunk(100, window_s, stride_s, n_queries)


def test_a_token_is_what_the_qformer_reads_in_its_own_window():
    audio, features = branch(n_queries=2, stride_s=0.25), torch.randn(2, *CHUNK)
    states, tokens = audio.encode(features), audio(features)
    assert tokens.shape[1] == 2 * 7
    for number in range(7):
        window = states[:, 12 * number : 12 * number + 25]
        read = audio.qformer(
            query_embeds=audio.queries.expand(2, -1, -1), encoder_hidden_states=window
        ).last_hidden_state
        assert torch.allclose(tokens[:, 2 * number : 2 * number + 2], audio.projection(read), atol=1e-5)


def test_chunks_do_not_hear_each_other():
    audio, features = branch(), torch.randn(3, *CHUNK)
    together = audio(features)
    assert torch.allclose(together, torch.cat([audio(chunk[None]) for chunk in features]), atol=1e-5)


def test_the_queries_are_learnt():
    audio = branch()
    audio(torch.randn(1, *CHUNK)).square().sum().backward()
    assert audio.queries.grad is not None and audio.queries.grad.abs().max() > 0


def test_tokens_have_the_type_of_the_weights():
    audio = branch().to(torch.bfloat16)
    tokens = audio(torch.randn(1, *CHUNK))
    assert tokens.dtype == torch.bfloat16 and tokens.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 16, 3000), (1, 128, 200), (16, 200)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(KokaneeError, match="16 mel bins x 200 frames"):
        branch()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"window_s": 3.0}, "only 2 s"), ({"window_s": 0.0}, "window_s"), ({"stride_s": 0.001}, "stride_s")],
)
def test_windows_that_cannot_be_cut_are_refused(changes, reason):
    with pytest.raises(KokaneeError, match=reason):
        branch(**changes)


def test_a_qformer_of_another_width_is_refused():
    config = tiny_config()
    config.qformer_config.encoder_hidden_size = 48
    with pytest.raises(KokaneeError, match="d_model"):
        AudioBranch(config.audio_config, config.qformer_config, 24)


def test_a_long_sound_is_encoded_some_chunks_at_a_time_to_the_same_tokens(monkeypatch):
    made, features, sizes = branch(), torch.randn(5, *CHUNK), []
    whole = made(features)
    monkeypatch.setattr(audio_module, "CHUNKS_AT_ONCE", 2)
    encode = made.encode
    monkeypatch.setattr(made, "encode", lambda part: sizes.append(len(part)) or encode(part))
    assert torch.allclose(made(features), whole, atol=1e-5) and sizes == [2, 2, 1]
