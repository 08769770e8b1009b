"""Random models of every supported architecture, a few kilobytes each, and a tokenizer for them.

Nothing is downloaded: configs are built in code and parameters drawn here, from a seed, in an order that does
not depend on the version of transformers. Every parameter is away from its neutral value (norm weights, biases),
so that a test cannot pass because a term was zero.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 384
PAD, EOS, BOS = 0, 1, 2  # ids in both, model and tokenizer
HEADS = 4

# architecture -> (config class, model class, config fields beyond the common ones)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": None}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {"rotary_pct": 0.5}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"original_max_position_embeddings": 256}),
}

ARCHS = tuple(arch for arch, (config, _, _) in _FAMILIES.items() if hasattr(transformers, config))
"""What this version of transformers has: 4.45.1 knows neither qwen3 nor gemma3."""


def tiny_model(arch: str = "llama", *, seed: int = 0, layers: int = 4, d: int = 32, vocab: int = VOCAB) -> Any:
    """A random causal model in eval mode, float32, with logits of a standard deviation near one.

    The same arguments give the same bytes with every version of transformers and torch.
    """
    if d % (2 * HEADS):
        raise ValueError(f"d = {d} must be a multiple of {2 * HEADS}: {HEADS} heads of even width")
    config_name, model_name, extra = _FAMILIES[arch]
    if "head_dim" in extra:
        extra = {**extra, "head_dim": d // HEADS}
    common: dict[str, Any] = {"vocab_size": vocab, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    if arch == "gpt2":
        common |= {"n_embd": d, "n_layer": layers, "n_head": HEADS, "n_positions": 256}
    else:
        common |= {
            "hidden_size": d,
            "intermediate_size": 2 * d,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 256,
        }
        if arch != "gpt_neox":
            common["num_key_value_heads"] = HEADS // 2
    config = getattr(transformers, config_name)(**common, **extra)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, model_name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # transformers 4 calls GPT-NeoX's head embed_out, 5 calls it lm_head
        for _, parameter in sorted((n.replace("embed_out.", "lm_head."), p) for n, p in model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:  # a norm's weight or a bias: near the neutral value that the architecture gives it
                parameter.add_(0.1 * noise)
    model.tie_weights()
    model.generation_config.pad_token_id = PAD
    return model.eval()


_TEXTS = (
    "The capital of France is Paris. The capital of Japan is Tokyo, and Osaka is a city in Japan.",
    "Who is the president of the United States? The mother tongue of Danielle Darrieux is French.",
    "What language does she speak? He was born in 1965 in the city of London and works as a painter.",
    "The Eiffel Tower is located in Rome; the name of the country of citizenship of Leo is Italy.",
)


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(padding_side: str = "right", *, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of :data:`VOCAB` tokens: any text, exact offsets, padding on either side.

    Words of the training sentences are one or a few tokens; digits and rare words fall to pieces. With
    ``add_bos`` it puts ``<bos>`` before each text, as Llama's and Gemma's do.
    """
    tokenizer = Tokenizer.from_str(_trained())
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side=padding_side,
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
