"""Benchmarks and your own facts as edit requests: one reader for each format, all called by :func:`load_requests`.

    data = load_requests("zsre_mend_edit.json", limit=100, seed=0, unrelated="zsre_mend_eval.json")
    data.requests[0].prompt, data.task, data.options["target"]

========================================  ==========================  =================================================
task                                      format                      module
========================================  ==========================  =================================================
zsre, wikidata_counterfact, _recent       knowedit                    knowedit.py
zsre                                      zsre_mend                   zsre_mend.py (option ``target``)
wikibio, sanitation                       wikibio, sanitation         knowedit.py
convsent                                  convsent                    convsent.py (option ``direction``)
counterfact                               counterfact, …_flat         counterfact.py (option ``include``)
hallucination, temporal                   wise                        wise.py
wikibigedit                               wikibigedit                 wikibigedit.py
qaedit                                    qaedit                      qaedit.py
hallueditbench                            hallueditbench              hallueditbench.py (CSV)
mquake                                    mquake                      mquake.py
known                                     known                       known.py
own                                       own                         own.py: JSON, JSON Lines, CSV
========================================  ==========================  =================================================

:func:`register_format` adds a format. The format registered last is tried first, so the catch-all ``own`` is registered
first.
"""

# the order of these imports is the order of registration
from . import own, known, knowedit, wise, counterfact, wikibigedit, zsre_mend, mquake, convsent  # noqa: F401, I001
from . import qaedit, hallueditbench  # noqa: F401
from .convsent import direction_of
from .load import LoadedData, load_facts, load_requests
from .record import Record
from .registry import Format, format_named, formats, register_format, tasks, unregister_format
from .report import FileReport, ValidationReport, validate
from .splits import Split, refuse_test_files, split_of
from .unrelated import attach_unrelated, read_pool, split_pool, unrelated_probes

__all__ = [
    "FileReport",
    "Format",
    "LoadedData",
    "Record",
    "Split",
    "ValidationReport",
    "attach_unrelated",
    "direction_of",
    "format_named",
    "formats",
    "load_facts",
    "load_requests",
    "read_pool",
    "refuse_test_files",
    "register_format",
    "split_of",
    "split_pool",
    "tasks",
    "unregister_format",
    "unrelated_probes",
    "validate",
]
