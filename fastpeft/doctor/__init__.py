"""What a machine can do for fine-tuning, and what is wrong with it: `fastpeft doctor`.

As JSON, which later versions may add to but not change:

    {"fastpeft": "0.1.0", "status": "note", "findings": [
        {"name": "link gpu 0", "status": "ok", "text": "...", "advice": "", "values": {"to_gpu_gb_per_s": 25.1}}, ...]}

- `status` is "ok", "note" (works, but worth knowing), "warning" (something works badly or not at all) or "problem" (the
  machine cannot fine-tune as it is installed, or cannot use the GPU that it has); at the top, the worst of them all.
- `name` is unique. GPUs are numbered as torch numbers them, or as nvidia-smi does where torch sees none.
- `text` and `advice` are for people and may change; `advice` is empty exactly where `status` is "ok".
- `values` are for programs: numbers with their unit in the key's ending, versions as text, null for what is unknown.

User names, home folders and secrets are blotted out of every text and value.
"""

from . import render
from .diagnosis import Diagnosis, examine
from .findings import Finding, Status

__all__ = ["Diagnosis", "Finding", "Status", "examine", "render"]
