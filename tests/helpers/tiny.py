"""A tokenizer of one id per byte, and random backbones small enough to start a hundred runs with."""

import flax.linen as nn
import jax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm2vec_gen_jax.formats import hf
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.backbone import abstract_params

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(bos=False):
    """A byte-level tokenizer of 260 ids with ChatML control tokens; one id per byte."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(control + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|begin|>" if bos else None,
        chat_template=CHAT_TEMPLATE,
    )


def save_random_backbone(folder):
    """Writes a Llama of 3 layers of width 32 with normal weights and the byte tokenizer, as a Hugging Face folder."""
    architecture = Architecture(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        qkv_bias=False,
        qk_norm=False,
        tied_embeddings=True,
    )
    shapes, tree = jax.tree.flatten(nn.unbox(abstract_params(architecture)))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    weights = [0.2 * jax.random.normal(key, x.shape) for key, x in zip(keys, shapes)]
    hf.save(folder, jax.tree.unflatten(tree, weights), architecture, tiny_tokenizer().save_pretrained, [2])
