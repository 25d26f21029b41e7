"""Models of text: decoders, mixtures of experts, hybrids with state spaces, encoders, encoder-decoders."""

from __future__ import annotations

import torch
from torch import nn

from zoo.architecture import HEADS, IGNORED, LAYERS, LENGTH, SAMPLES, VOCAB, WIDTH, Architecture, Batch

COMMON = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, max_position_embeddings=2 * LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = COMMON | dict(num_key_value_heads=2, head_dim=WIDTH // HEADS)
EXPERTS = GROUPED | dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=WIDTH)
LATENT = dict(  # attention of DeepSeek: q, k and v from narrow layers, v narrower than q and k
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, head_dim=8,
    num_key_value_heads=HEADS,
)  # fmt: skip
ROUTED = dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=WIDTH, n_group=1,
              topk_group=1, first_k_dense_replace=1)  # fmt: skip
STATES = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
GPT = dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=2 * LENGTH, bos_token_id=1,
           eos_token_id=2)  # fmt: skip
BART = dict(
    vocab_size=VOCAB, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS,
    decoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDTH, decoder_ffn_dim=2 * WIDTH, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, max_position_embeddings=2 * LENGTH,
)  # fmt: skip
T5 = dict(vocab_size=VOCAB, d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS,
          pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)  # fmt: skip


def tokens(model: nn.Module | None = None, length: int = LENGTH) -> Batch:
    """Sequences of which the last is shorter, as batches of text are; the loss is over all tokens but padding."""
    ids = torch.randint(3, VOCAB - 8, (SAMPLES, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[-1, -5:] = mask[-1, -5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def long(model: nn.Module) -> Batch:
    """As many tokens as the sparse attention of BigBird takes before it turns to full attention."""
    return tokens(length=96)


def pairs(model: nn.Module) -> Batch:
    """Source and target of different lengths."""
    return tokens() | {"labels": tokens(length=LENGTH // 2)["labels"]}


def classes(model: nn.Module) -> Batch:
    """A label for each sequence."""
    return tokens() | {"labels": torch.arange(SAMPLES) % 2}


def detected(model: nn.Module) -> Batch:
    """Which tokens were replaced, as ELECTRA's discriminator has to tell."""
    return tokens() | {"labels": (torch.arange(SAMPLES * LENGTH) % 5 == 0).long().view(SAMPLES, LENGTH)}


def _decoder(name: str, of_class: str, config: dict, kind: str = "decoder") -> Architecture:
    return Architecture(name, f"{of_class}ForCausalLM", kind, tokens, config)


DECODERS = [
    _decoder("llama", "Llama", GROUPED),
    _decoder("qwen3", "Qwen3", GROUPED),
    _decoder("gemma2", "Gemma2", GROUPED | dict(query_pre_attn_scalar=16, sliding_window=16)),
    _decoder(
        "gemma3_text",
        "Gemma3",
        GROUPED
        | dict(query_pre_attn_scalar=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    ),
    _decoder("phi3", "Phi3", COMMON | dict(num_key_value_heads=2)),
    Architecture("gpt2", "GPT2LMHeadModel", "decoder", tokens, GPT),
    _decoder("gpt_neox", "GPTNeoX", COMMON | dict(rotary_pct=0.5)),
    _decoder("opt", "OPT", COMMON | dict(ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH)),
    _decoder("bloom", "Bloom", dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS)),
    _decoder("falcon", "Falcon", COMMON | dict(multi_query=True, new_decoder_architecture=False, alibi=False)),
    _decoder("mpt", "Mpt", dict(vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_seq_len=64)),
    _decoder("olmo2", "Olmo2", GROUPED),
    _decoder("cohere", "Cohere", GROUPED),
    _decoder("glm4", "Glm4", GROUPED),
    _decoder("granite", "Granite", GROUPED),
    _decoder("starcoder2", "Starcoder2", GROUPED),
    _decoder("stablelm", "StableLm", GROUPED),
    _decoder("nemotron", "Nemotron", GROUPED),
    _decoder("persimmon", "Persimmon", COMMON),
    _decoder("gptj", "GPTJ", GPT | dict(rotary_dim=8)),
    _decoder("smollm3", "SmolLM3", GROUPED),
]
MIXTURES = [
    _decoder(name, of_class, EXPERTS | more, "mixture of experts")
    for name, of_class, more in (
        ("mixtral", "Mixtral", {}),
        ("qwen2_moe", "Qwen2Moe", dict(shared_expert_intermediate_size=WIDTH)),
        ("qwen3_moe", "Qwen3Moe", {}),
        ("deepseek_v3", "DeepseekV3", LATENT | ROUTED),
        ("olmoe", "Olmoe", {}),
        ("gpt_oss", "GptOss", dict(sliding_window=16)),
        ("granitemoe", "GraniteMoe", {}),
        ("dots1", "Dots1", ROUTED),
    )
]
HYBRIDS = [
    _decoder(name, of_class, config, "hybrid")
    for name, of_class, config in (
        (
            "jamba",
            "Jamba",
            EXPERTS
            | dict(
                attn_layer_period=2,
                attn_layer_offset=1,
                expert_layer_period=2,
                expert_layer_offset=1,
                mamba_d_state=8,
                mamba_dt_rank=8,
                use_mamba_kernels=False,
            ),
        ),
        ("bamba", "Bamba", GROUPED | STATES | dict(attn_layer_indices=[1])),
        (
            "zamba2",
            "Zamba2",
            COMMON
            | dict(
                num_key_value_heads=4,
                mamba_ngroups=1,
                n_mamba_heads=8,
                mamba_d_state=8,
                mamba_headdim=16,
                chunk_size=8,
                layers_block_type=["mamba", "hybrid"],
                num_mem_blocks=1,
                use_mem_rope=True,
            ),
        ),
        ("falcon_h1", "FalconH1", GROUPED | STATES),
        (
            "recurrent_gemma",
            "RecurrentGemma",
            GROUPED | dict(lru_width=WIDTH, attention_window_size=16, block_types=["recurrent", "attention"]),
        ),
        (
            "mamba2",
            "Mamba2",
            dict(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_heads=8,
                head_dim=16,
                state_size=8,
                n_groups=1,
                chunk_size=8,
                expand=2,
            ),
        ),
        ("mamba", "Mamba", dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8)),
        ("lfm2", "Lfm2", GROUPED | dict(full_attn_idxs=[1], block_multiple_of=32)),
        (
            "qwen3_next",
            "Qwen3Next",
            EXPERTS
            | dict(
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=16,
                linear_value_head_dim=16,
                shared_expert_intermediate_size=WIDTH,
                layer_types=["linear_attention", "full_attention"],
            ),
        ),
    )
]
ENCODERS = [
    Architecture("bert", "BertForSequenceClassification", "encoder", classes, COMMON),
    Architecture("roberta", "RobertaForMaskedLM", "encoder", tokens, COMMON),
    Architecture(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        "encoder",
        tokens,
        COMMON | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], legacy=False),
    ),
    Architecture("electra", "ElectraForPreTraining", "encoder", detected, COMMON | dict(embedding_size=32)),
    Architecture(
        "modernbert", "ModernBertForMaskedLM", "encoder", tokens, COMMON | dict(cls_token_id=1, sep_token_id=2)
    ),
    Architecture(
        "big_bird",
        "BigBirdForMaskedLM",
        "encoder",
        long,
        COMMON | dict(block_size=4, num_random_blocks=1, max_position_embeddings=128),
    ),
    Architecture(
        "funnel",
        "FunnelForSequenceClassification",
        "encoder",
        classes,
        dict(
            vocab_size=VOCAB,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=WIDTH,
            n_head=HEADS,
            d_head=16,
            d_inner=2 * WIDTH,
        ),
    ),
    Architecture("albert", "AlbertForMaskedLM", "encoder", tokens, COMMON | dict(embedding_size=32)),
    Architecture(
        "distilbert",
        "DistilBertForMaskedLM",
        "encoder",
        tokens,
        dict(vocab_size=VOCAB, dim=WIDTH, hidden_dim=2 * WIDTH, n_layers=LAYERS, n_heads=HEADS),
    ),
]
ENCODER_DECODERS = [
    Architecture(
        "t5", "T5ForConditionalGeneration", "encoder-decoder", pairs, T5 | dict(feed_forward_proj="gated-gelu")
    ),
    Architecture("bart", "BartForConditionalGeneration", "encoder-decoder", pairs, BART),
    Architecture("pegasus", "PegasusForConditionalGeneration", "encoder-decoder", pairs, BART),
    Architecture("marian", "MarianMTModel", "encoder-decoder", pairs, BART | dict(decoder_vocab_size=VOCAB)),
    Architecture("m2m_100", "M2M100ForConditionalGeneration", "encoder-decoder", pairs, BART),
    Architecture(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        "encoder-decoder",
        pairs,
        dict(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            encoder_ffn_dim=2 * WIDTH,
            decoder_ffn_dim=2 * WIDTH,
            num_encoder_layers=LAYERS,
            num_decoder_layers=LAYERS,
            num_encoder_attention_heads=HEADS,
            num_decoder_attention_heads=HEADS,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=0,
            max_position_embeddings=64,
        ),
    ),
    Architecture(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        "encoder-decoder",
        pairs,
        T5 | dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    ),
]
TEXT = [*DECODERS, *MIXTURES, *HYBRIDS, *ENCODERS, *ENCODER_DECODERS]
