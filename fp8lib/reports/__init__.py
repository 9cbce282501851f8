"""What a run found, for machines and for eyes.

document             the report as JSON's types, after report_schema.json
report_schema.json   the schema of it, versioned
charts               its pictures, as SVG
page                 the same as one self-contained HTML page

May import outputs, verification and below. Knows neither flags nor where a report goes. Only `charts` and
`page` need matplotlib and jinja2, which are not among the tool's requirements.
"""

GENERATOR = "quantize_fp8.py --report"
"""What tells a page that this tool wrote."""
