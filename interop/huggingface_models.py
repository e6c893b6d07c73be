"""The architectures that `transformers` has too: how their configs and weights are converted.

A class for each, in CONVERTERS, has the methods

    export_config(config) -> a Config in the keys of a config.json
    export_weights(state, config, vocab_size) -> {their name: tensor} of a state dict
    keys(config) -> the Keys of a config.json
    import_config(keys) -> the fields of a Config
    import_weights(stored, keys, fields) -> the state dict of {their name: tensor}

and `sizes`, {our field: (their key, transformers' default)}.
"""

import math

import torch


class Keys:
    """The values of a config.json, each checked when it is asked for.

    config: the dict that was read. inside: the key whose value it is; '': it is the whole file.
    problems: a message for each value that can't be used.
    assumed: {key: default} of the sizes that are missing.
    """

    def __init__(self, config, inside=''):
        self.config = config
        self.inside = f'{inside}.' if inside else ''
        self.problems = []
        self.assumed = {}

    def has(self, key):
        """Whether the key has a value; null stands for the default."""
        return self.config.get(key) is not None

    def refuse(self, key, reason):
        """Add a problem: this key's value, and the reason why it can't be used."""
        value = self.config[key] if key in self.config else self.assumed[key]
        self.problems.append(f"{self.inside}{key}={shortened(value)} {reason}")

    def size(self, key, default):
        """A whole number from 1 up. If the key is missing, the default, noted in `assumed`."""
        if key not in self.config:
            self.assumed[key] = default
            return default
        if type(self.config[key]) is not int or self.config[key] < 1:
            self.refuse(key, "is not a whole number from 1 up")
            return default
        return self.config[key]

    def optional_size(self, key, default):
        """A whole number from 1 up; the default if the key is missing or null."""
        return self.size(key, default) if self.has(key) else default

    def number(self, key, default=None):
        """A number above 0; the default if the key is missing or null; without one, a problem."""
        value = self.config[key] if self.has(key) else default
        if value is None and default is None:
            self.problems.append(f"{self.inside}{key} is missing")
            return 1.0
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.refuse(key, "is not a number above 0")
            return 1.0
        return float(value)

    def flag(self, key, default):
        """true or false; the default if the key is missing or null."""
        value = self.config[key] if self.has(key) else default
        if type(value) is not bool:
            self.refuse(key, "is neither true nor false")
            return default
        return value

    def choice(self, key, choices, default):
        """choices[value]; choices[default] if the key is missing or null."""
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
    """A value of a config.json for a message, in at most 60 characters."""
    text = repr(value)
    if len(text) > 60:
        return f'{text[:57]}...'
    return text


class GPT2:
    """model.GPT as GPT2LMHeadModel, which stores linear weights as (in, out) and always has biases.

    Activations that differ only in rounding are treated as the same. reorder_and_upcast_attn is
    ignored: it changes nothing but the rounding of scores in half precision, and transformers'
    default kernel ignores it too.
    """

    model_type = 'gpt2'
    architecture = 'GPT2LMHeadModel'
    sizes = {
        'block_size': ('n_positions', 1024),
        'vocab_size': ('vocab_size', 50257),
        'n_layer': ('n_layer', 12),
        'n_head': ('n_head', 12),
        'n_embd': ('n_embd', 768),
    }
    # {their key: another name that transformers accepts for it}
    aliases = {
        'n_positions': 'max_position_embeddings',
        'n_layer': 'num_hidden_layers',
        'n_head': 'num_attention_heads',
        'n_embd': 'hidden_size',
    }
    # {their activation: our gelu}
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
    # {our gelu: their activation}, of several the one that runs torch's own kernel
    exported_activations = {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh', 'relu': 'relu'}
    transposed = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) there
    vocab_tables = ('transformer.wte.weight', 'lm_head.weight')  # a row per id
    without_bias = (*vocab_tables, 'transformer.wpe.weight')

    @classmethod
    def export_config(cls, c):
        """A Config `c` in the keys of a config.json."""
        sizes = {theirs: getattr(c, ours) for ours, (theirs, _) in cls.sizes.items()}
        dropout = dict.fromkeys(('embd_pdrop', 'attn_pdrop', 'resid_pdrop'), c.dropout)
        return {
            **sizes,
            **dropout,
            'n_ctx': c.block_size,
            'n_inner': c.inner,
            'layer_norm_epsilon': c.norm_eps,
            'activation_function': cls.exported_activations[c.gelu],
            'tie_word_embeddings': c.tied,
            'scale_attn_weights': True,
            'scale_attn_by_inverse_layer_idx': False,
            'add_cross_attention': False,
        }

    @classmethod
    def keys(cls, config):
        """The Keys of a config.json, with aliases under the name that they stand for."""
        config = dict(config)
        for name, alias in cls.aliases.items():
            if alias in config:
                config[name] = config[alias]
        return Keys(config)

    @classmethod
    def import_config(cls, keys):
        """The Config fields of a config.json; what can't be used is added to keys.problems."""
        fields = {ours: keys.size(theirs, default) for ours, (theirs, default) in cls.sizes.items()}
        H = fields['n_head']
        C = fields['n_embd']
        if C % H and not keys.problems:
            keys.refuse('n_embd', f"is not divisible by n_head={H}")
        n_inner = keys.optional_size('n_inner', 4 * C)
        keys.only('add_cross_attention', False)
        # These two are only checked here; _scale_queries applies them.
        keys.flag('scale_attn_weights', True)
        keys.flag('scale_attn_by_inverse_layer_idx', False)
        return {
            **fields,
            'n_inner': 0 if n_inner == 4 * C else n_inner,  # 0: 4 of n_embd
            'bias': True,
            'gelu': keys.choice('activation_function', cls.activations, 'gelu_new'),
            'tied': keys.flag('tie_word_embeddings', True),
            'norm_eps': keys.number('layer_norm_epsilon', 1e-5),
        }

    @classmethod
    def export_weights(cls, state, c, vocab_size):
        """{their name: tensor} of a state dict of Config `c`, for the first vocab_size ids."""
        stored = {}
        for name, value in state.items():
            if name == 'lm_head.weight' and c.tied:
                continue
            if name in cls.vocab_tables:
                value = value[:vocab_size]
            if name.endswith(cls.transposed):
                value = value.t()
            stored[name] = value
            stem, _, kind = name.rpartition('.')
            if kind == 'weight' and name not in cls.without_bias and f'{stem}.bias' not in state:
                stored[f'{stem}.bias'] = value.new_zeros(value.shape[-1])
        return stored

    @classmethod
    def import_weights(cls, stored, keys, fields):
        """Our state dict of {their name: tensor}, whose names may lack `transformer.`.

        fields: what import_config returned for these keys."""
        state = {}
        for name, value in stored.items():
            if name.endswith(('.attn.bias', '.attn.masked_bias')):  # causal masks
                continue
            if name != 'lm_head.weight':
                name = 'transformer.' + name.removeprefix('transformer.')
            if name.endswith(cls.transposed):
                value = value.t()
            state[name] = value
        cls._scale_queries(state, keys, fields)
        return state

    @classmethod
    def _scale_queries(cls, state, keys, fields):
        """Scale the queries' weights and biases in the dict `state`: our attention always divides
        scores by √D, theirs may not, or also by the layer's number.

        Scaled tensors become float64, so that they are rounded only once, by `load_weights`.
        """
        C = fields['n_embd']
        D = C // fields['n_head']
        factor = 1.0 if keys.flag('scale_attn_weights', True) else math.sqrt(D)
        is_by_layer = keys.flag('scale_attn_by_inverse_layer_idx', False)
        for layer in range(fields['n_layer']):
            scale = factor / (layer + 1) if is_by_layer else factor
            if scale == 1:
                continue
            for kind in ('weight', 'bias'):
                name = f'transformer.h.{layer}.attn.c_attn.{kind}'
                if name in state:
                    queries = state[name][:C].double() * scale
                    keys_and_values = state[name][C:].double()
                    state[name] = torch.cat([queries, keys_and_values])


class Llama:
    """models/transformerpp.py as LlamaForCausalLM, in which queries, keys and values have a matrix
    each."""

    model_type = 'llama'
    architecture = 'LlamaForCausalLM'
    sizes = {
        'block_size': ('max_position_embeddings', 2048),
        'vocab_size': ('vocab_size', 32000),
        'n_layer': ('num_hidden_layers', 32),
        'n_head': ('num_attention_heads', 32),
        'n_embd': ('hidden_size', 4096),
        'n_hidden': ('intermediate_size', 11008),
    }
    # {our field: its values that Llama has too}
    exportable = {'attention_kind': ('mha', 'gqa', 'mqa'), 'norm_place': ('pre',)}
    # {their rope_type: our rope_scaling}
    ropes = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3'}
    vocab_tables = ('model.embed_tokens.weight', 'lm_head.weight')  # a row per id
    # {our module: theirs}; if theirs are several, our matrix is theirs, stacked.
    outer_modules = {
        'transformer.wte': 'model.embed_tokens',
        'transformer.ln_f': 'model.norm',
        'lm_head': 'lm_head',
    }
    block_modules = {
        'ln_1': 'input_layernorm',
        'ln_2': 'post_attention_layernorm',
        'attn.c_attn': 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
        'attn.c_q': 'self_attn.q_proj',
        'attn.c_kv': 'self_attn.k_proj self_attn.v_proj',
        'attn.c_proj': 'self_attn.o_proj',
        'mlp.c_gate': 'mlp.gate_proj',
        'mlp.c_fc': 'mlp.up_proj',
        'mlp.c_proj': 'mlp.down_proj',
    }

    @classmethod
    def weight_names(cls, n_layer):
        """Yield (our name, [their names]) of all weights: ours is theirs, stacked along dim 0."""
        for ours, theirs in cls.outer_modules.items():
            yield f'{ours}.weight', [f'{theirs}.weight']
        for layer in range(n_layer):
            for ours, theirs in cls.block_modules.items():
                for kind in ('weight', 'bias'):
                    names = [f'model.layers.{layer}.{name}.{kind}' for name in theirs.split()]
                    yield f'transformer.h.{layer}.{ours}.{kind}', names

    @classmethod
    def export_config(cls, c):
        """A Config `c` in the keys of a config.json. Raises ValueError for what Llama lacks."""
        for name, supported in cls.exportable.items():
            value = getattr(c, name)
            if value not in supported:
                raise ValueError(
                    f"can't be exported: Hugging Face's Llama has no {name}={value!r}, only "
                    f"{', '.join(supported)}"
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
        """The keys of the rotary embedding: rope_parameters, and the two that transformers read
        before version 5."""
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
    def import_config(cls, keys):
        """The Config fields of a config.json; what can't be used is added to keys.problems."""
        fields = {ours: keys.size(theirs, default) for ours, (theirs, default) in cls.sizes.items()}
        H = fields['n_head']
        C = fields['n_embd']
        G = keys.optional_size('num_key_value_heads', H)
        if H % G:
            keys.refuse('num_key_value_heads', f"is not a divisor of num_attention_heads={H}")
        if G == H:
            kind = 'mha'
        elif G == 1:
            kind = 'mqa'
        else:
            kind = 'gqa'
        D = keys.optional_size('head_dim', max(1, C // H))
        if keys.has('head_dim') and D % 2:
            keys.refuse('head_dim', "is odd: rotary embeddings rotate pairs of channels")
        if not keys.has('head_dim') and C % (2 * H) and not keys.problems:
            keys.refuse(
                'hidden_size',
                f"is not divisible by 2 x num_attention_heads={H}: rotary embeddings rotate "
                "pairs of channels; weights with heads of another size need head_dim",
            )
        keys.choice('hidden_act', {'silu': 'silu', 'swish': 'silu'}, 'silu')  # only checked
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
        """The Config fields of the rotary embedding: from rope_scaling (transformers before version
        5) if it has a value, otherwise from rope_parameters."""
        name = 'rope_scaling' if keys.config.get('rope_scaling') else 'rope_parameters'
        config = keys.config.get(name) or {}
        if type(config) is not dict:
            keys.refuse(name, "is not an object")
            return {}
        rope = Keys(config, inside=name)
        type_key = 'rope_type' if rope.has('rope_type') else 'type'
        scaling = rope.choice(type_key, cls.ropes, 'default')
        rope.only('partial_rotary_factor', 1.0)
        theta_keys = rope if rope.has('rope_theta') else keys
        fields = {'rope_theta': theta_keys.number('rope_theta', 1e4), 'rope_scaling': scaling}
        if scaling != 'none':
            fields['rope_factor'] = rope.number('factor')
        if scaling == 'llama3':
            low = rope.number('low_freq_factor')
            high = rope.number('high_freq_factor')
            if low >= high and not rope.problems:
                rope.refuse('low_freq_factor', f"is not below high_freq_factor={high}")
            fields |= {'rope_low_freq': low, 'rope_high_freq': high}
            original = 'original_max_position_embeddings'
            original_keys = keys if keys.has(original) else rope  # as transformers looks it up
            fields['rope_original'] = original_keys.optional_size(original, block_size)
        keys.problems += rope.problems
        return fields

    @classmethod
    def export_weights(cls, state, c, vocab_size):
        """{their name: tensor} of a state dict of Config `c`, for the first vocab_size ids."""
        stored = {}
        for ours, theirs in cls.weight_names(c.n_layer):
            if ours in state and not (ours == 'lm_head.weight' and c.tied):
                stored |= zip(theirs, state[ours].chunk(len(theirs)), strict=True)
        for name in cls.vocab_tables:
            if name in stored:
                stored[name] = stored[name][:vocab_size]
        return stored

    @classmethod
    def import_weights(cls, stored, keys, fields):
        """Our state dict of {their name: tensor}; fields: what import_config returned for these
        keys."""
        # Old versions of transformers store the rotations' frequencies.
        stored = {name: v for name, v in stored.items() if not name.endswith('inv_freq')}
        # mha has one matrix for queries, keys and values; gqa and mqa have one for the queries.
        absent = ('attn.c_attn',)
        if fields['attention_kind'] == 'mha':
            absent = ('attn.c_q', 'attn.c_kv')
        state = {}
        for ours, theirs in cls.weight_names(fields['n_layer']):
            if ours.rpartition('.')[0].endswith(absent):
                continue
            if all(name in stored for name in theirs):
                state[ours] = torch.cat([stored.pop(name) for name in theirs])
        # load_weights reports what is missing, and what is left over here.
        return state | stored


# {our name of the architecture: class}
CONVERTERS = {'gpt': GPT2, 'transformerpp': Llama}
