"""What lmms-eval's entry point ``lmms_eval.models`` loads: the model's name and where its class is.

A module of its own, for importing lmms-eval already loads it: the class, which imports lmms-eval, would not
be there yet.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("dynamic_llava", simple_class_path="dynamic_llava.lmms.plugin.DynamicLlava")
