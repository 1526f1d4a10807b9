"""The method's losses: functions of student and teacher tensors; no trainer, no model, no file.

``gdkd`` (eq. 1-6, on logits), ``linear_gdkd`` (the same from hidden states, without logits of all tokens), ``rcka``
(eq. 10-13), ``controller`` (eq. 18-20), ``objective`` (eq. 21), ``official`` (the official code's roundings).
"""

from grace_vlm.losses.controller import AdaptiveWeight
from grace_vlm.losses.gdkd import DistillationTerms, confidence_gate, gated_decoupled_kd
from grace_vlm.losses.linear_gdkd import LinearGdkdTerms, linear_gate, linear_gdkd
from grace_vlm.losses.objective import LossTerms, Normalizers, Objective, compute_terms
from grace_vlm.losses.rcka import relational_cka
from grace_vlm.losses.signal import TeacherSignal

__all__ = [
    "AdaptiveWeight",
    "DistillationTerms",
    "LinearGdkdTerms",
    "LossTerms",
    "Normalizers",
    "Objective",
    "TeacherSignal",
    "compute_terms",
    "confidence_gate",
    "gated_decoupled_kd",
    "linear_gate",
    "linear_gdkd",
    "relational_cka",
]
