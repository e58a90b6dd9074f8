"""The description of the API as a page (`/docs`), made of `/openapi.json`: no script, and nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from unimm.sections import Section
from unimm.server.schemas import ChatRequest, EditRequest, ImageRequest

DOCS_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
BODIES: dict[str, type[Section]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/images/generations": ImageRequest,
    "/v1/images/edits": EditRequest,
}
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; font-size: 1.1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: .9rem; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid #8886; border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
"""
_EXAMPLES = {
    "/v1/chat/completions": (
        '{{"model": "{model}", "messages": [{{"role": "user", "content": "what is a star?"}}]}}'
    ),
    "/v1/images/generations": '{{"model": "{model}", "prompt": "two stars on blue", "seed": 7}}',
}


def with_bodies(document: dict[str, Any]) -> dict[str, Any]:
    """Return a description of the API with what the routes take, which the routes themselves read within bounds."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path, kind in BODIES.items():
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        if kind is EditRequest:
            content["multipart/form-data"] = content["application/json"]
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
    return document


def docs_page(document: dict[str, Any], model: str) -> str:
    """Return the page.

    Args:
        document: of `with_bodies`.
        model: what clients call it, for the examples.
    """
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(document['info']['title'])} API</title>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<style>{_STYLE}</style><h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>",
        f"<p>{escape(document['info']['description'])} Machines read <a href=/openapi.json>/openapi.json</a>.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route['summary'])}</p>"
            )
            if path in BODIES:
                parts += [_fields(BODIES[path], document), _example(path, model)]
    return "".join(parts)


def _fields(kind: type[Section], document: dict[str, Any]) -> str:
    """Return the table of a request's fields."""
    schema = document["components"]["schemas"][kind.__name__]
    required = schema.get("required", [])
    rows = []
    for name, field in schema["properties"].items():
        default = (
            "required" if name in required else "" if field.get("default") is None else repr(field["default"])
        )
        cells = (f"<code>{escape(name)}</code>", escape(_type(field)), escape(default))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    text = " ".join((kind.__doc__ or "").split())
    return f"<p>{escape(text)}</p><table><tr><th>field<th>type<th>default</tr>{''.join(rows)}</table>"


def _type(field: dict[str, Any]) -> str:
    """Return a field's type in words."""
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}"
    return str(field.get("type", field.get("const", "any")))


def _example(path: str, model: str) -> str:
    """Return how a route is called from a shell."""
    if path not in _EXAMPLES:
        return ""
    body = _EXAMPLES[path].format(model=model)
    line = f"curl http://localhost:8000{path} -H 'Content-Type: application/json' -d '{body}'"
    return f"<pre>{escape(line)}</pre>"
