"""Hugging Face's format, both ways: a model's config, weights and tokenizer as `transformers` and
its kin read them.

TWINS has the architectures that `transformers` has too, each with a class that says what its
config and weights are there.
"""

import json
import math
import os
import re
from pathlib import Path

import safetensors.torch
import torch

from system import hub
from text import tokenizer_files

# The sizes that OpenAI published, with the commits of openai-community/NAME on the Hugging Face
# Hub.
OPENAI = {
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e',
    'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519',
    'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2',
}
FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)


class Keys:
    """The values of a config.json, each checked when it is asked for.

    problems: a sentence for each that can't be used.
    assumed: {key: default} of the sizes that are missing.
    inside: the key whose object `config` is; '': it is the whole file.
    """

    def __init__(self, config, inside=''):
        self.config = config
        self.inside = f'{inside}.' if inside else ''
        self.problems = []
        self.assumed = {}

    def has(self, key):
        """Whether the key is there with a value: null leaves it to the default."""
        return self.config.get(key) is not None

    def refuse(self, key, reason):
        value = self.config[key] if key in self.config else self.assumed[key]
        self.problems.append(f"{self.inside}{key}={shortened(value)} {reason}")

    def size(self, key, default):
        """A whole number from 1 up. Where the key is missing, it is noted in `assumed`."""
        if key not in self.config:
            self.assumed[key] = default
            return default
        if type(self.config[key]) is not int or self.config[key] < 1:
            self.refuse(key, "is not a whole number from 1 up")
            return default
        return self.config[key]

    def optional_size(self, key, default):
        """A whole number from 1 up; without the key, or with null, it is the default."""
        return self.size(key, default) if self.has(key) else default

    def number(self, key, default=None):
        """A number above 0; without the key, or with null, it is the default, if there is one."""
        value = self.config[key] if self.has(key) else default
        if value is None and default is None:
            self.problems.append(f"{self.inside}{key} is missing")
            return 1.0
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(key, "is not a number above 0")
            return 1.0
        return float(value)

    def flag(self, key, default):
        """true or false; without the key, or with null, it is the default."""
        value = self.config[key] if self.has(key) else default
        if type(value) is not bool:
            self.refuse(key, "is neither true nor false")
            return default
        return value

    def choice(self, key, choices, default):
        """choices[value]; where the key is missing or null, choices[default]."""
        value = self.config[key] if self.has(key) else default
        if type(value) is str and value in choices:
            return choices[value]
        self.refuse(key, f"is not supported, only {', '.join(choices)}")
        return choices[default]

    def only(self, key, supported):
        """Refuse every value but `supported`; a missing key and null are accepted."""
        value = self.config.get(key, supported)
        if value is not None and value != supported:
            self.refuse(key, f"is not supported, only {supported}")


def shortened(value):
    """A value of a config.json as it stands in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


class GPT2:
    """model.GPT as GPT2LMHeadModel, which stores linear weights as (in, out) and always has biases.

    Activations that differ only in rounding are treated as the same. reorder_and_upcast_attn is
    ignored: it changes nothing but the rounding of scores in half precision, and transformers'
    default kernel ignores it too.
    """

    model_type, architecture = 'gpt2', 'GPT2LMHeadModel'
    # {our field: (their key, transformers' default)}
    sizes = {
        'block_size': ('n_positions', 1024),
        'vocab_size': ('vocab_size', 50257),
        'n_layer': ('n_layer', 12),
        'n_head': ('n_head', 12),
        'n_embd': ('n_embd', 768),
    }
    # {their key: another that transformers reads as the same}
    aliases = {
        'n_positions': 'max_position_embeddings',
        'n_layer': 'num_hidden_layers',
        'n_head': 'num_attention_heads',
        'n_embd': 'hidden_size',
    }
    activations = {
        'gelu': 'exact',
        'gelu_python': 'exact',
        'gelu_new': 'tanh',
        'gelu_fast': 'tanh',
        'gelu_accurate': 'tanh',
        'gelu_pytorch_tanh': 'tanh',
        'gelu_python_tanh': 'tanh',
        'relu': 'relu',
    }
    # what export writes: torch's own kernels there
    written = {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh', 'relu': 'relu'}
    linear = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
    tables = ('transformer.wte.weight', 'lm_head.weight')  # a row per id
    without_bias = (*tables, 'transformer.wpe.weight')

    @classmethod
    def config(cls, c):
        """config.json's part of a Config `c`."""
        sizes = {theirs: getattr(c, ours) for ours, (theirs, _) in cls.sizes.items()}
        dropout = dict.fromkeys(('embd_pdrop', 'attn_pdrop', 'resid_pdrop'), c.dropout)
        return {
            **sizes,
            **dropout,
            'n_ctx': c.block_size,
            'n_inner': c.inner,
            'layer_norm_epsilon': c.norm_eps,
            'activation_function': cls.written[c.gelu],
            'tie_word_embeddings': c.tied,
            'scale_attn_weights': True,
            'scale_attn_by_inverse_layer_idx': False,
            'add_cross_attention': False,
        }

    @classmethod
    def keys(cls, config):
        """The Keys of a config.json by their own names."""
        aliases = {name: alias for name, alias in cls.aliases.items() if alias in config}
        return Keys(config | {name: config[alias] for name, alias in aliases.items()})

    @classmethod
    def fields(cls, keys):
        """The Config fields of a config.json; what can't be used is in keys.problems."""
        fields = {ours: keys.size(theirs, default) for ours, (theirs, default) in cls.sizes.items()}
        H, C = fields['n_head'], fields['n_embd']
        if C % H and not keys.problems:
            keys.refuse('n_embd', f"is not divisible by n_head={H}")
        n_inner = keys.optional_size('n_inner', 4 * C)
        keys.only('add_cross_attention', False)
        # These two are only checked here: _scale_queries uses them.
        keys.flag('scale_attn_weights', True)
        keys.flag('scale_attn_by_inverse_layer_idx', False)
        return {
            **fields,
            'n_inner': 0 if n_inner == 4 * C else n_inner,
            'bias': True,
            'gelu': keys.choice('activation_function', cls.activations, 'gelu_new'),
            'tied': keys.flag('tie_word_embeddings', True),
            'norm_eps': keys.number('layer_norm_epsilon', 1e-5),
        }

    @classmethod
    def stored(cls, state, c, vocab_size):
        """What is stored there of a model with this state dict and Config, for vocab_size ids."""
        stored = {}
        for name, value in state.items():
            if name == 'lm_head.weight' and c.tied:
                continue
            if name in cls.tables:
                value = value[:vocab_size]
            if name.endswith(cls.linear):
                value = value.t()
            stored[name] = value
            stem, _, kind = name.rpartition('.')
            if kind == 'weight' and name not in cls.without_bias and f'{stem}.bias' not in state:
                stored[f'{stem}.bias'] = value.new_zeros(value.shape[-1])
        return stored

    @classmethod
    def state(cls, stored, keys, fields):
        """The state dict out of what is stored there, whose names may lack `transformer.`; fields:
        of `fields`."""
        state = {}
        for name, value in stored.items():
            if name.endswith(('.attn.bias', '.attn.masked_bias')):  # masks
                continue
            if name != 'lm_head.weight':
                name = 'transformer.' + name.removeprefix('transformer.')
            state[name] = value.t() if name.endswith(cls.linear) else value
        cls._scale_queries(state, keys, fields)
        return state

    @classmethod
    def _scale_queries(cls, state, keys, fields):
        """Scale the queries' weights and biases in the dict `state`, so that our attention, which
        divides scores by √D, computes what theirs does.

        Scaled tensors become float64: they are rounded once, when `fill` loads them.
        """
        C = fields['n_embd']
        D = C // fields['n_head']
        factor = 1.0 if keys.flag('scale_attn_weights', True) else math.sqrt(D)
        is_by_layer = keys.flag('scale_attn_by_inverse_layer_idx', False)
        for layer in range(fields['n_layer']):
            own = factor / (layer + 1) if is_by_layer else factor
            for kind in ('weight', 'bias'):
                name = f'transformer.h.{layer}.attn.c_attn.{kind}'
                if own != 1 and name in state:
                    queries, others = state[name][:C], state[name][C:]
                    state[name] = torch.cat([queries.double() * own, others.double()])


class Llama:
    """models/transformerpp.py as LlamaForCausalLM: queries, keys and values have matrices of their
    own there."""

    model_type, architecture = 'llama', 'LlamaForCausalLM'
    # {our field: (their key, transformers' default)}
    sizes = {
        'block_size': ('max_position_embeddings', 2048),
        'vocab_size': ('vocab_size', 32000),
        'n_layer': ('num_hidden_layers', 32),
        'n_head': ('num_attention_heads', 32),
        'n_embd': ('hidden_size', 4096),
        'n_hidden': ('intermediate_size', 11008),
    }
    # {their rope_type: our rope_scaling}
    ropes = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3'}
    outside = {
        'transformer.wte': 'model.embed_tokens',
        'transformer.ln_f': 'model.norm',
        'lm_head': 'lm_head',
    }
    q, k, v = 'self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'
    block = {
        'ln_1': 'input_layernorm',
        'ln_2': 'post_attention_layernorm',
        'attn.c_attn': f'{q} {k} {v}',
        'attn.c_q': q,
        'attn.c_kv': f'{k} {v}',
        'attn.c_proj': 'self_attn.o_proj',
        'mlp.c_gate': 'mlp.gate_proj',
        'mlp.c_fc': 'mlp.up_proj',
        'mlp.c_proj': 'mlp.down_proj',
    }

    @classmethod
    def pairs(cls, n_layer):
        """(our name, [their names]): ours has their matrices, or biases, one above the other."""
        for ours, theirs in cls.outside.items():
            yield f'{ours}.weight', [f'{theirs}.weight']
        for layer in range(n_layer):
            for ours, theirs in cls.block.items():
                for kind in ('weight', 'bias'):
                    names = [f'model.layers.{layer}.{name}.{kind}' for name in theirs.split()]
                    yield f'transformer.h.{layer}.{ours}.{kind}', names

    @classmethod
    def config(cls, c):
        """config.json's part of a Config `c`. Raises ValueError where Llama has no such thing."""
        for name, known in (('attention_kind', ('mha', 'gqa', 'mqa')), ('norm_place', ('pre',))):
            if getattr(c, name) not in known:
                raise ValueError(
                    f"can't be exported: Hugging Face's Llama has no {name}={getattr(c, name)!r}, but "
                    f"{', '.join(known)}"
                )
        if c.n_embd % c.n_head:
            raise ValueError(
                f"can't be exported: n_embd={c.n_embd} is not divisible by "
                f"n_head={c.n_head}, which Hugging Face's Llama requires"
            )
        sizes = {theirs: getattr(c, ours) for ours, (theirs, _) in cls.sizes.items()}
        return {
            **sizes,
            **cls.rope_keys(c),
            'intermediate_size': c.hidden,  # n_hidden may be 0
            'num_key_value_heads': c.kv_heads,
            'head_dim': c.head_size,
            'hidden_act': 'silu',
            'attention_bias': c.attention_bias,
            'mlp_bias': c.mlp_bias,
            'rms_norm_eps': c.norm_eps,
            'attention_dropout': c.attn_dropout or c.dropout,
            'tie_word_embeddings': c.tied,
        }

    @staticmethod
    def rope_keys(c):
        """What config.json says of the rotations: in rope_parameters, and in the two keys that
        transformers read before version 5."""
        rope = {'rope_type': 'default'}
        if c.rope_scaling != 'none':
            rope = {'rope_type': c.rope_scaling, 'factor': c.rope_factor}
        if c.rope_scaling == 'llama3':
            rope |= {
                'low_freq_factor': c.rope_low_freq,
                'high_freq_factor': c.rope_high_freq,
                'original_max_position_embeddings': c.rope_original,
            }
        return {
            'rope_theta': c.rope_theta,
            'rope_scaling': None if c.rope_scaling == 'none' else rope,
            'rope_parameters': rope | {'rope_theta': c.rope_theta},
        }

    @classmethod
    def keys(cls, config):
        """The Keys of a config.json."""
        return Keys(config)

    @classmethod
    def fields(cls, keys):
        """The Config fields of a config.json; what can't be used is in keys.problems."""
        fields = {ours: keys.size(theirs, default) for ours, (theirs, default) in cls.sizes.items()}
        H, C = fields['n_head'], fields['n_embd']
        G = keys.optional_size('num_key_value_heads', H)
        if H % G:
            keys.refuse('num_key_value_heads', f"is not a divisor of num_attention_heads={H}")
        kind = 'mha' if G == H else 'mqa' if G == 1 else 'gqa'
        D = keys.optional_size('head_dim', max(1, C // H))
        if keys.has('head_dim') and D % 2:
            keys.refuse('head_dim', "is odd: rotation is of pairs")
        if not keys.has('head_dim') and C % (2 * H) and not keys.problems:
            keys.refuse(
                'hidden_size',
                f"is not divisible by 2 x num_attention_heads={H}: rotation "
                "is of pairs; weights with heads of another size need head_dim",
            )
        keys.choice('hidden_act', {'silu': 'silu', 'swish': 'silu'}, 'silu')  # one, by two names
        keys.only('partial_rotary_factor', 1.0)
        return {
            **fields,
            'attention_kind': kind,
            'n_kv_head': G if kind == 'gqa' else 0,
            'head_dim': 0 if D * H == C else D,
            'attention_bias': keys.flag('attention_bias', False),
            'mlp_bias': keys.flag('mlp_bias', False),
            'tied': keys.flag('tie_word_embeddings', False),
            'norm_eps': keys.number('rms_norm_eps', 1e-6),
            **cls.rope_fields(keys, fields['block_size']),
        }

    @classmethod
    def rope_fields(cls, keys, block_size):
        """The Config fields of the rotary embedding, from rope_scaling (transformers before version
        5) if it has a value, else from rope_parameters."""
        name = 'rope_scaling' if keys.config.get('rope_scaling') else 'rope_parameters'
        found = keys.config.get(name) or {}
        if type(found) is not dict:
            keys.refuse(name, "is not an object")
            return {}
        rope = Keys(found, inside=name)
        type_key = 'rope_type' if rope.has('rope_type') else 'type'
        scaling = rope.choice(type_key, cls.ropes, 'default')
        rope.only('partial_rotary_factor', 1.0)
        theta = rope if rope.has('rope_theta') else keys
        fields = {'rope_theta': theta.number('rope_theta', 1e4), 'rope_scaling': scaling}
        if scaling != 'none':
            fields['rope_factor'] = rope.number('factor')
        if scaling == 'llama3':
            low, high = rope.number('low_freq_factor'), rope.number('high_freq_factor')
            if low >= high and not rope.problems:
                rope.refuse('low_freq_factor', f"is not below high_freq_factor={high}")
            fields |= {'rope_low_freq': low, 'rope_high_freq': high}
            original = 'original_max_position_embeddings'
            where = keys if keys.has(original) else rope  # transformers looks in this order
            fields['rope_original'] = where.optional_size(original, block_size)
        keys.problems += rope.problems
        return fields

    @classmethod
    def stored(cls, state, c, vocab_size):
        """What is stored there of a model with this state dict and Config, for vocab_size ids."""
        stored = {}
        for ours, theirs in cls.pairs(c.n_layer):
            if ours in state and not (ours == 'lm_head.weight' and c.tied):
                stored |= zip(theirs, state[ours].chunk(len(theirs)), strict=True)
        return {k: v[:vocab_size] if 'embed' in k or 'head' in k else v for k, v in stored.items()}

    @classmethod
    def state(cls, stored, keys, fields):
        """The state dict out of what is stored there; fields: of `fields`."""
        # old versions' angles
        stored = {k: v for k, v in stored.items() if not k.endswith('inv_freq')}
        absent = ('attn.c_attn',)
        if fields['attention_kind'] == 'mha':
            absent = ('attn.c_q', 'attn.c_kv')
        state = {}
        for ours, theirs in cls.pairs(fields['n_layer']):
            is_here = all(name in stored for name in theirs)  # else `fill` says what is missing
            if is_here and not ours.rpartition('.')[0].endswith(absent):
                state[ours] = torch.cat([stored.pop(name) for name in theirs])
        return state | stored  # nothing should be left


TWINS = {'gpt': GPT2, 'transformerpp': Llama}


def read(source):
    """(architecture, Config fields, state dict) of an OpenAI size, a folder or a .safetensors file.

    Prints which sizes config.json leaves to transformers' defaults. Raises ValueError, OSError.
    """
    path = (
        Path(source)
        if Path(source).is_dir() or str(source).endswith('.safetensors')
        else _download(source)
    )
    folder = path.parent if path.suffix == '.safetensors' else path
    name, keys = _read_config(folder / 'config.json')
    twin = TWINS[name]
    fields = twin.fields(keys)
    if keys.has('quantization_config'):
        keys.refuse('quantization_config', "is not supported: use the weights as they were trained")
    if keys.problems:
        problems = '; '.join(keys.problems)
        raise ValueError(f"{folder / 'config.json'} can't be loaded as --model={name}: {problems}")
    stored = _weights(path)
    _check_depth(stored, twin.sizes['n_layer'][0], keys, path)
    if keys.assumed:
        defaults = ', '.join(f'{key}={default}' for key, default in keys.assumed.items())
        missing = ', '.join(keys.assumed)
        _notice(f"{folder}/config.json lacks {missing}: using transformers' {defaults}")
    try:
        state = twin.state(stored, keys, fields)
    except RuntimeError as error:  # torch's, of other shapes
        reason = ' '.join(str(error).split())[:120]
        raise ValueError(f"{path}: weights don't fit its config.json ({reason})") from None
    if fields['tied']:
        _tie_head(state, keys, fields, path)
    return name, fields, state


def _read_config(path):
    """(architecture, Keys) of a config.json in any Unicode encoding. Raises ValueError, OSError."""
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if type(config) is not dict:
        raise ValueError(f"{path} can't be used: it holds a {type(config).__name__}, not an object")
    known = {twin.model_type: name for name, twin in TWINS.items()}
    supported = ' and '.join(f"{theirs} (as --model={ours})" for theirs, ours in known.items())
    if 'model_type' not in config:
        raise ValueError(f"{path} can't be used: model_type is missing; supported are {supported}")
    model_type = config['model_type']
    if type(model_type) is not str or model_type not in known:
        raise ValueError(
            f"{path} can't be used: model_type={shortened(model_type)} is not "
            f"supported, only {supported}"
        )
    name = known[model_type]
    return name, TWINS[name].keys(config)


def _check_depth(stored, key, keys, path):
    """ValueError where the weights are of more or fewer layers than config.json says with `key`."""
    matches = (re.search(r'(?:^|\.)(?:h|layers)\.(\d+)\.', name) for name in stored)
    n_layer = len({match[1] for match in matches if match})
    expected = keys.assumed.get(key) or keys.config[key]
    if n_layer != expected:
        says = f"says {key}={expected}"
        if key in keys.assumed:
            says = f"lacks {key}, for which transformers uses {expected}"
        raise ValueError(f"{path} has the weights of {n_layer} layers, and its config.json {says}")


def _tie_head(state, keys, fields, path):
    """Put the embeddings' table into the dict `state` as the head. A stored head that differs from
    it stays instead, and unties the model, as transformers does it: then fields['tied'] becomes
    False.
    """
    table = state.get('transformer.wte.weight')
    head = state.setdefault('lm_head.weight', table)
    if table is None or head is table or _are_equal(head, table):
        return  # without a table, `fill` says that it is missing
    fields['tied'] = False
    says = "lacks tie_word_embeddings, for which transformers uses true"
    if keys.has('tie_word_embeddings'):
        says = "says tie_word_embeddings=true"
    _notice(
        f"{path} stores an lm_head.weight that differs from the embeddings, although its "
        f"config.json {says}: using both, as transformers does (tied=False)"
    )


def _are_equal(a, b):
    """Whether two tensors, perhaps of different dtypes, have the same shape and numbers."""
    return a.shape == b.shape and bool((a == b).all())


def _notice(text):
    """Print a line, once for all processes of a run."""
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)


def fill(model, weights, source):
    """Put the state dict that `read` got from `source` into `model`. Raises ValueError unless it is
    its own."""
    own = model.state_dict()
    missing = [name for name in own if weights.get(name) is None]
    unknown = [name for name in weights if name not in own]
    shared = [name for name in own if name not in missing]
    unfit = [name for name in shared if weights[name].shape != own[name].shape]
    reasons = []
    if unfit:
        there, here = tuple(weights[unfit[0]].shape), tuple(own[unfit[0]].shape)
        reasons.append(f"{unfit[0]} has the shape {there}, by config.json {here}")
    if missing:
        reasons.append(f"missing: {_some(missing)}")
    if unknown:
        reasons.append(f"not in a model of this config.json: {_some(unknown)}")
    if reasons:
        count = len(unfit) + len(missing) + len(unknown)
        raise ValueError(
            f"{source}: {count} weights are missing or don't fit its config.json: "
            f"{'; '.join(reasons)}"
        )
    model.load_state_dict(weights)


def _some(names):
    """The first three of the names, and how many more there are."""
    more = len(names) - 3
    return ', '.join(names[:3]) + (f" and {more} more" if more > 0 else '')


def _download(name):
    """The folder with config.json and model.safetensors of an OpenAI size; NANOGPT_MIRROR may hold
    it as NAME/."""
    if name not in OPENAI:
        raise ValueError(f"{name!r} is neither a folder nor one of {', '.join(OPENAI)}")
    if folder := hub.mirror_folder(name):
        return folder
    try:
        for file in ('config.json', 'model.safetensors'):
            path = hub.download(f'openai-community/{name}', file, OPENAI[name])
    except OSError as error:
        raise OSError(
            f"{error}; or put config.json and model.safetensors of {name} into a folder and give that as "
            "--init_from"
        ) from None
    return path.parent


def _weights(path):
    """{name: tensor} of a file, or of a folder: of the one file there, or of those that its index
    names."""
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"{path} has no {FILES[0]} or {FILES[2]}")
        path = there[0]
    try:
        if path.suffix == '.bin':
            found = torch.load(path, map_location='cpu', weights_only=True)
            if not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor)
                for name, tensor in found.items()
            ):
                raise ValueError("it holds something other than tensors with names")
            return dict(found)
        if path.suffix != '.json':
            return safetensors.torch.load_file(path)
        names = sorted(set(json.loads(path.read_bytes())['weight_map'].values()))
        if wrong := [
            name
            for name in names
            if not name.endswith(('.safetensors', '.bin'))
            or '..' in Path(name).parts
            or Path(name).is_absolute()
        ]:
            raise ValueError(f"it names {wrong[0]!r}, which is no file of weights in this folder")
        shards = [path.parent / name for name in names]
    except Exception as error:  # each format's own errors
        reason = ' '.join(str(error).split())[:120]
        raise ValueError(
            f"{path} is damaged or not plain weights ({type(error).__name__}: {reason})"
        ) from None
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(
                f"{shard} is missing, one of {len(shards)} files that {path} names"
            )
    return {name: tensor for shard in shards for name, tensor in _weights(shard).items()}


def content(model, name, dtype):
    """({file: text or JSON}, {name: tensor}) of a model of the architecture `name`, padded ids left
    out. ValueError."""
    if name not in TWINS:
        raise ValueError(
            f"Hugging Face's format has no model like {name!r}: train one with --model={' or '.join(TWINS)}"
        )
    twin, c, own = TWINS[name], model.config, model.tokenizer
    vocab_size, eot = (
        min(own.vocab_size, c.vocab_size) if own else c.vocab_size,
        getattr(own, 'eot', None),
    )
    ends = {'bos_token_id': eot, 'eos_token_id': eot}
    files = {
        'config.json': {
            'architectures': [twin.architecture],
            'model_type': twin.model_type,
            **twin.config(c),
            'vocab_size': vocab_size,
            **ends,
            'torch_dtype': dtype,
        },
        'generation_config.json': {**ends, 'pad_token_id': eot},
    }
    files |= tokenizer_files.to_files(own, c.block_size) if own else {}
    weights = twin.stored(model.state_dict(), c, vocab_size)
    return files, {k: v.to(getattr(torch, dtype)).contiguous() for k, v in weights.items()}
