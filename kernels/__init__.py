"""Faster forms of the project's operations: speed only, no meaning. Without this folder all runs.

FORMS says for each operation, by the name of its plain form, where its faster forms are and for
which definition they were written (`parts.ops.definition`, a digest of the plain form's code).
Change a plain form and it runs as you wrote it; the forms here then stand aside until they compute
the same and their digest is renewed:

    python -m kernels          # every operation with the digest it has and the one noted here
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    definition: str  # digest of the plain form that the modules below compute the same as
    cuda: str | None = None  # module of this folder that has a function of the same name
    cpu: str | None = None


FORMS = {
    "flow_grpo.sde_draw": Form("af8deb4f4a8f", cuda="triton_forms"),
    "flow_grpo.sde_log_prob": Form("c2435ef66979", cuda="triton_forms"),
    "grpo.token_log_probs": Form("bf186e0cefaa", cuda="log_probs", cpu="log_probs"),
    "mmdit.gate_residual": Form("afe64985d250", cuda="triton_forms", cpu="cpu_forms"),
    "mmdit.gelu_linear": Form("dcaffe825dbe", cpu="cpu_forms"),
    "mmdit.joint_qkv": Form("f3494e886e65", cuda="triton_forms"),
    "mmdit.modulate": Form("ef99c03631ad", cuda="triton_forms", cpu="cpu_forms"),
    "parts.ops.channels_last": Form("c931dab5a4ac", cpu="cpu_forms"),
    "parts.ops.rms_norm": Form("37c094cc14b2", cuda="triton_forms", cpu="cpu_forms"),
    "parts.ops.split_qkv": Form("0af9817f0b96", cuda="triton_forms"),
    "qwen_vl.attend_shared": Form("", cuda="shared_attention", cpu="shared_attention"),
    "qwen_vl.rotate": Form("", cpu="cpu_forms"),
    "qwen_vl.split_rotate": Form("", cuda="triton_forms"),
    "qwen_vl.swiglu": Form("", cuda="triton_forms"),
}
