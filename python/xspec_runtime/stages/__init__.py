"""The five-stage benchmark: where a request's time goes in both models, and what runs beside what.

`clock` times one model on one clip, `run` walks a dataset, `record` is the published schema with
what it lacked, `report` draws it.
"""
