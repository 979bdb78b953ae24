"""The studies by name: what runs each spec, and where its results go."""

from __future__ import annotations

from pathlib import Path

from device_tests.perturbation import Perturbation
from device_tests.report.charts import Pictures
from device_tests.report.study_document import StudyDocument
from device_tests.report.study_render import write_study
from factory.progress import Progress
from factory.studies.collusion import collusion
from factory.studies.conformity import conformity
from factory.studies.localized import localized
from factory.studies.purifier import purifier_study
from factory.studies.replication import replication
from factory.studies.spec import (
    AnySpec,
    CollusionSpec,
    ConformitySpec,
    LocalizedSpec,
    PurifierSpec,
    ReplicationSpec,
    Table1Spec,
    VolumizationSpec,
    WhiteboxSpec,
)
from factory.studies.table1 import table1
from factory.studies.volumization import open_volumization, volumization
from factory.studies.volumized_arms import arm_trainer
from factory.studies.whitebox import GALLERY, gallery_of, whitebox
from factory.studies.workbench import open_workbench


def run_study(spec: AnySpec, name: str, out: Path, progress: Progress, command: str) -> StudyDocument:
    """Run a study in the studies' folder ``out`` and write study.json, study.md, study.html and figures/ below it.

    The results go to ``out/name``. What an interrupted run finished is kept and not done again.
    """
    if isinstance(spec, VolumizationSpec):
        with open_volumization(out, spec, progress) as networks:
            document = volumization(networks, arm_trainer(networks), command)
            write_study(out / name, document, {})
        return document
    galleries: dict[str, list[Pictures]] = {}
    with open_workbench(out, spec, progress) as bench:
        match spec:
            case Table1Spec():
                document = table1(bench, spec, command)
            case CollusionSpec():
                document = collusion(bench, spec, command)
            case ReplicationSpec():
                document = replication(bench, spec, command)
            case LocalizedSpec():
                document = localized(bench, spec, command)
            case ConformitySpec():
                document = conformity(bench, spec, command)
            case PurifierSpec():
                document, galleries = purifier_study(bench, spec, command)
            case WhiteboxSpec():
                document = whitebox(bench, spec, command)
                shown = gallery_of(bench, spec, Perturbation.parse(spec.epsilon))
                galleries = {GALLERY: [pictures for pictures, _ in shown]}
        write_study(out / name, document, galleries)
    return document
