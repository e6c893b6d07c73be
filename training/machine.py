"""What a run computes on: the device, and the values of the settings that may be 'auto'."""

from dataclasses import dataclass

from system.compilation import resolve_compile
from system.device import (
    resolve_device,
    resolve_dtype,
    set_threads,
    tune_for_speed,
    use_deterministic_algorithms,
)
from training import distributed


@dataclass
class Machine:
    """What a run computes on."""

    device: str  # of this process: cpu, mps, cuda or cuda:N
    dtype: str  # of activations: float32, bfloat16 or float16
    compile_mode: bool | str  # True, False, or 'auto', which compile_model decides
    threads: int

    @property
    def device_type(self):
        """The device without its number: cpu, mps or cuda."""
        return self.device.partition(':')[0]

    def resolved(self):
        """What a checkpoint keeps, for `open_machine` of a resumed run."""
        return dict(
            device=self.device_type,
            dtype=self.dtype,
            compile=self.compile_mode,
            threads=self.threads,
        )


def open_machine(config, recorded):
    """Join the other processes of the run, and resolve train.py's settings; returns the Machine.

    recorded: `resolved` of the run that is resumed, which keeps these values while it is on the
    same kind of device; or {}. Raises ValueError for a setting that is not possible here.
    """
    use_deterministic_algorithms(config['deterministic'])
    device = resolve_device(config['device'], recorded.get('device'))
    device = distributed.init(config['backend'], device, config['parallel'])
    if recorded.get('device') != device.partition(':')[0]:
        recorded = {}

    dtype = config['dtype']
    if dtype == 'auto':
        dtype = recorded.get('dtype', 'auto')
    compile_mode = config['compile']
    if compile_mode == 'auto':
        compile_mode = recorded.get('compile', 'auto')
    machine = Machine(
        device=device,
        dtype=resolve_dtype(dtype, device),
        compile_mode=resolve_compile(compile_mode, device),
        threads=set_threads(recorded.get('threads')),
    )
    tune_for_speed()
    return machine
