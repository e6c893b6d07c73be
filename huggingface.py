"""Hugging Face's format, both ways: a model's config, weights and tokenizer as `transformers` and its kin read them.

TWINS has the architectures that `transformers` has too, each with a class that says what its config and weights are there.
"""
import itertools
import json
from pathlib import Path

import safetensors.torch
import torch

import hub
import tokenizer_files

# The sizes that OpenAI published, with the commits of openai-community/NAME on the Hugging Face Hub.
OPENAI = {
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e', 'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519', 'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2',
}
FILES = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')


class GPT2:
    """model.GPT as GPT2LMHeadModel: linear weights lie (in, out) there, biases are always there, the head is wte."""

    model_type, architecture = 'gpt2', 'GPT2LMHeadModel'
    names = (('block_size', 'n_positions'), *((name, name) for name in ('vocab_size', 'n_layer', 'n_head', 'n_embd')))
    gelus = (('gelu', 'exact'), ('gelu_new', 'tanh'), ('gelu_pytorch_tanh', 'tanh'))    # the last is torch's own kernel
    linear = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')

    @staticmethod
    def fixed(n_embd):      # what another GPT-2's config.json may say otherwise
        return dict(n_inner=4 * n_embd, layer_norm_epsilon=1e-5, scale_attn_weights=True, tie_word_embeddings=True,
                    scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)

    @classmethod
    def config(cls, c):
        """config.json's part of a Config `c`."""
        return {**{theirs: getattr(c, ours) for ours, theirs in cls.names}, **cls.fixed(c.n_embd), 'n_ctx': c.block_size,
                **dict.fromkeys(('embd_pdrop', 'attn_pdrop', 'resid_pdrop'), c.dropout),
                'activation_function': {ours: theirs for theirs, ours in cls.gelus}[c.gelu]}

    @classmethod
    def fields(cls, config):
        """The Config fields of a config.json. Raises ValueError."""
        act, sizes = config.get('activation_function', 'gelu_new'), {ours: config[theirs] for ours, theirs in cls.names}
        if act not in dict(cls.gelus) or {*map(type, sizes.values())} != {int} or any(
                config.get(k) not in (None, v) for k, v in cls.fixed(config['n_embd']).items()):
            raise ValueError("a GPT-2 whose activation, sizes, attention, norms or head differ from GPT's")
        return {**sizes, 'bias': True, 'gelu': dict(cls.gelus)[act]}

    @classmethod
    def stored(cls, state, c, vocab_size):
        """What is stored there, out of the state dict of a model with the Config `c`; of wte the first vocab_size rows."""
        state = {k: v.t() if k.endswith(cls.linear) else v for k, v in state.items() if k != 'lm_head.weight'}
        state['transformer.wte.weight'] = state['transformer.wte.weight'][:vocab_size]
        return {k.removesuffix('weight') + 'bias': v.new_zeros(v.shape[-1]) for k, v in state.items()
                if k.endswith('.weight') and k not in ('transformer.wte.weight', 'transformer.wpe.weight')} | state

    @classmethod
    def state(cls, stored, fields):
        """The state dict out of what is stored there, whose names may lack `transformer.`; fields: of `fields`."""
        stored = {'transformer.' + k.removeprefix('transformer.'): v for k, v in stored.items()}
        state = {k: v.t() if k.endswith(cls.linear) else v for k, v in stored.items()
                 if not k.endswith(('.attn.bias', '.attn.masked_bias', '.lm_head.weight'))}     # masks, and wte once more
        return state | {'lm_head.weight': state.get('transformer.wte.weight')}


class Llama:
    """models/transformerpp.py as LlamaForCausalLM: queries, keys and values have matrices of their own there."""

    model_type, architecture = 'llama', 'LlamaForCausalLM'
    names = (('block_size', 'max_position_embeddings'), ('vocab_size', 'vocab_size'), ('n_layer', 'num_hidden_layers'),
             ('n_head', 'num_attention_heads'), ('n_embd', 'hidden_size'))
    outside = {'transformer.wte': 'model.embed_tokens', 'transformer.ln_f': 'model.norm', 'lm_head': 'lm_head'}
    q, k, v = 'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'
    block = {'ln_1': 'input_layernorm', 'ln_2': 'post_attention_layernorm', 'attn.c_attn': f'{q} {k} {v}', 'attn.c_q': q,
             'attn.c_kv': f'{k} {v}', 'attn.c_proj': 'self_attn.o_proj', 'mlp.c_gate': 'mlp.gate_proj',
             'mlp.c_fc': 'mlp.up_proj', 'mlp.c_proj': 'mlp.down_proj'}

    @classmethod
    def pairs(cls, n_layer):
        """(our name, [their names]): of which ours has the matrices one above the other."""
        yield from ((f'{ours}.weight', [f'{theirs}.weight']) for ours, theirs in cls.outside.items())
        for layer, (ours, theirs) in itertools.product(range(n_layer), cls.block.items()):
            names = [f'model.layers.{layer}.{name}.weight' for name in theirs.split()]
            yield f'transformer.h.{layer}.{ours}.weight', names

    @staticmethod
    def fixed(n_embd, n_head):      # what another Llama's config.json may say otherwise
        return dict(hidden_act='silu', attention_bias=False, mlp_bias=False, head_dim=n_embd // n_head)

    @classmethod
    def config(cls, c):
        """config.json's part of a Config `c`. Raises ValueError where Llama has no such thing."""
        for name, known in (('attention_kind', ('mha', 'gqa', 'mqa')), ('norm_place', ('pre',))):
            if getattr(c, name) not in known:
                raise ValueError(f"can't be exported: Hugging Face's Llama has no {name}={getattr(c, name)!r}, but "
                                 f"{', '.join(known)}")
        return {**{theirs: getattr(c, ours) for ours, theirs in cls.names}, **cls.fixed(c.n_embd, c.n_head),
                'intermediate_size': c.hidden, 'num_key_value_heads': c.kv_heads, 'rms_norm_eps': c.norm_eps,
                'rope_theta': c.rope_theta, 'rope_parameters': {'rope_type': 'default', 'rope_theta': c.rope_theta},
                'attention_dropout': c.attn_dropout or c.dropout, 'tie_word_embeddings': c.tied}

    @classmethod
    def fields(cls, config):
        """The Config fields of a config.json. Raises ValueError."""
        sizes = {ours: config[theirs] for ours, theirs in (*cls.names, ('n_hidden', 'intermediate_size'))}
        if {*map(type, sizes.values())} != {int} or min(sizes.values()) < 1:
            raise ValueError("a Llama whose sizes are not all whole numbers from 1 up")
        H, rope = sizes['n_head'], {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}
        found = {**config, 'rope_type': rope.get('rope_type', rope.get('type'))}
        other = [f'{k}={found[k]!r}' for k, v in {**cls.fixed(sizes['n_embd'], H), 'rope_type': 'default'}.items()
                 if found.get(k) not in (None, v)]
        if other:
            raise ValueError(f"a Llama with {', '.join(other)}, which transformerpp does not have")
        G = config.get('num_key_value_heads') or H
        if type(G) is not int or not 0 < G <= H:
            raise ValueError(f"a Llama whose num_key_value_heads={G!r} is no number of heads up to {H}")
        kind = 'mha' if G == H else 'mqa' if G == 1 else 'gqa'
        return {**sizes, 'attention_kind': kind, 'n_kv_head': G if kind == 'gqa' else 0,
                'tied': bool(config.get('tie_word_embeddings', False)), 'norm_eps': float(config.get('rms_norm_eps', 1e-6)),
                'rope_theta': float(rope.get('rope_theta', config.get('rope_theta', 1e4)))}

    @classmethod
    def stored(cls, state, c, vocab_size):
        """What is stored there, out of the state dict of a model with the Config `c`; of ids the first vocab_size."""
        stored = {}
        for ours, theirs in cls.pairs(c.n_layer):
            if ours in state and not (ours == 'lm_head.weight' and c.tied):
                stored |= zip(theirs, state[ours].chunk(len(theirs)), strict=True)
        return {k: v[:vocab_size] if 'embed' in k or 'head' in k else v for k, v in stored.items()}

    @classmethod
    def state(cls, stored, fields):
        """The state dict out of what is stored there; fields: of `fields`."""
        stored = {k: v for k, v in stored.items() if not k.endswith('inv_freq')}       # old versions' angles
        state, absent = {}, ('c_q.weight', 'c_kv.weight') if fields['attention_kind'] == 'mha' else ('c_attn.weight',)
        if fields['tied']:
            stored['lm_head.weight'] = stored.get('model.embed_tokens.weight')
        for ours, theirs in cls.pairs(fields['n_layer']):
            if not ours.endswith(absent):
                parts = [stored.pop(name, None) for name in theirs]
                state[ours] = None if any(part is None for part in parts) else torch.cat(parts)
        return state | stored       # nothing should be left


TWINS = {'gpt': GPT2, 'transformerpp': Llama}


def read(source):
    """(architecture, Config fields, state dict) of an OpenAI size, a folder or a .safetensors file. ValueError, OSError."""
    path = Path(source) if Path(source).is_dir() or str(source).endswith('.safetensors') else _download(source)
    folder = path.parent if path.suffix == '.safetensors' else path
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        known = {twin.model_type: (name, twin) for name, twin in TWINS.items()}
        if config.get('model_type') not in known:
            raise ValueError(f"the folder holds a {config.get('model_type')!r} model, not {' or '.join(known)}")
        name, twin = known[config['model_type']]
        fields = twin.fields(config)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'} can't be used ({type(error).__name__}: {error})") from None
    stored = _weights(path)
    if fields['n_layer'] > len(stored):
        raise ValueError(f"{path} has {len(stored)} weights, too few for the {fields['n_layer']} layers of its config.json")
    try:
        return name, fields, twin.state(stored, fields)
    except RuntimeError as error:       # torch's, of other shapes
        raise ValueError(f"{path}: weights don't fit its config.json ({' '.join(str(error).split())[:120]})") from None


def fill(model, weights, source):
    """Put the state dict that `read` got from `source` into `model`. Raises ValueError unless it is its own."""
    own = model.state_dict()
    wrong = [k for k in own | weights if k not in own or weights.get(k) is None or weights[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{source}: {len(wrong)} weights are missing or don't fit its config.json, {min(wrong)} for one")
    model.load_state_dict(weights)


def _download(name):
    """The folder with config.json and model.safetensors of an OpenAI size; NANOGPT_MIRROR may hold it as NAME/."""
    if name not in OPENAI:
        raise ValueError(f"{name!r} is neither a folder nor one of {', '.join(OPENAI)}")
    if folder := hub.mirror_folder(name):
        return folder
    try:
        for file in ('config.json', 'model.safetensors'):
            path = hub.download(f'openai-community/{name}', file, OPENAI[name])
    except OSError as error:
        raise OSError(f"{error}; or put config.json and model.safetensors of {name} into a folder and give that as "
                      "--init_from") from None
    return path.parent


def _weights(path):
    """{name: tensor} of a file, or of a folder: of the one file there, or of those that its index names."""
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"{path} has no {FILES[0]} or {FILES[2]}")
        path = there[0]
    try:
        if path.suffix == '.bin':
            found = torch.load(path, map_location='cpu', weights_only=True)
            if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()):
                raise ValueError("it holds something other than tensors with names")
            return dict(found)
        if path.suffix != '.json':
            return safetensors.torch.load_file(path)
        names = sorted(set(json.loads(path.read_text(encoding='utf-8'))['weight_map'].values()))
        if wrong := [name for name in names if not name.endswith(('.safetensors', '.bin')) or '..' in Path(name).parts
                     or Path(name).is_absolute()]:
            raise ValueError(f"it names {wrong[0]!r}, which is no file of weights in this folder")
        shards = [path.parent / name for name in names]
    except Exception as error:      # each format's own errors
        reason = ' '.join(str(error).split())[:120]
        raise ValueError(f"{path} is damaged or not plain weights ({type(error).__name__}: {reason})") from None
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing, one of {len(shards)} files that {path} names")
    return {name: tensor for shard in shards for name, tensor in _weights(shard).items()}


def content(model, name, dtype):
    """({file: text or JSON}, {name: tensor}) of a model of the architecture `name`, padded ids left out. ValueError."""
    if name not in TWINS:
        raise ValueError(f"Hugging Face's format has no model like {name!r}: train one with --model={' or '.join(TWINS)}")
    twin, c, own = TWINS[name], model.config, model.tokenizer
    vocab_size, eot = min(own.vocab_size, c.vocab_size) if own else c.vocab_size, getattr(own, 'eot', None)
    ends = {'bos_token_id': eot, 'eos_token_id': eot}
    files = {'config.json': {'architectures': [twin.architecture], 'model_type': twin.model_type,
                             **twin.config(c), 'vocab_size': vocab_size, **ends, 'torch_dtype': dtype},
             'generation_config.json': {**ends, 'pad_token_id': eot}}
    files |= tokenizer_files.to_files(own, c.block_size) if own else {}
    weights = twin.stored(model.state_dict(), c, vocab_size)
    return files, {k: v.to(getattr(torch, dtype)).contiguous() for k, v in weights.items()}
