"""The method's losses: functions of student and teacher tensors; no trainer, no model, no file.

``gdkd`` (eq. 1-6), ``rcka`` (eq. 10-13), ``controller`` (eq. 18-20), ``objective`` (eq. 21).
"""

from grace_vlm.losses.controller import AdaptiveWeight
from grace_vlm.losses.gdkd import DistillationTerms, confidence_gate, gated_decoupled_kd
from grace_vlm.losses.objective import LossTerms, Normalizers, Objective, compute_terms
from grace_vlm.losses.rcka import relational_cka
from grace_vlm.losses.signal import TeacherSignal

__all__ = [
    "AdaptiveWeight",
    "DistillationTerms",
    "LossTerms",
    "Normalizers",
    "Objective",
    "TeacherSignal",
    "compute_terms",
    "confidence_gate",
    "gated_decoupled_kd",
    "relational_cka",
]
