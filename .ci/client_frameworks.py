"""LangChain, instructor and pydantic-ai, unmodified, against --demo (argument 1)."""
import sys
from typing import Literal

import instructor
import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL = sys.argv[1] + "/v1"


class Colour(BaseModel):
    """A colour of a thing."""

    name: Literal["red", "blue"]
    strength: int
    notes: list[str]


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def langchain() -> None:
    def chat(model: str) -> ChatOpenAI:
        return ChatOpenAI(model=model, base_url=URL, api_key="none", max_retries=0)
    assert chat("demo-text").invoke("Hi").content.startswith("Hello!")
    streamed = list(chat("demo-text").stream("Hi"))
    assert len(streamed) > 5 and "".join(c.content for c in streamed).startswith("Hello!")
    with_tools = chat("demo-tool").bind_tools([get_weather])
    question = HumanMessage("How is it?")
    answer = with_tools.invoke([question])
    assert answer.tool_calls[0]["name"] == "get_weather", answer
    result = ToolMessage(get_weather.invoke(answer.tool_calls[0]["args"]),
                         tool_call_id=answer.tool_calls[0]["id"])
    assert with_tools.invoke([question, answer, result]).content == "The tool said: sunny in text"
    forced = chat("demo-text").bind_tools([get_weather], tool_choice="get_weather").invoke("x")
    assert forced.tool_calls[0]["args"] == {"city": "text"}
    for method in "json_schema", "function_calling":
        colour = chat("demo-text").with_structured_output(Colour, method=method).invoke("Which?")
        assert colour == Colour(name="red", strength=1, notes=["text"]), (method, colour)
    assert OpenAI(model="demo-text", base_url=URL, api_key="none").invoke("Hi").startswith("Hello!")


def instructor_forces_a_named_tool() -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.TOOLS)
    colour = client.chat.completions.create(
        model="demo-text", response_model=Colour, messages=[{"role": "user", "content": "Which?"}])
    assert colour.name == "red"


def pydantic_ai() -> None:
    model = OpenAIChatModel("demo-text", provider=OpenAIProvider(base_url=URL, api_key="none"))
    assert Agent(model).run_sync("Hi").output.startswith("Hello!")
    assert Agent(model, output_type=Colour).run_sync("Which?").output.strength == 1


for check in langchain, instructor_forces_a_named_tool, pydantic_ai:
    check()
    print(check.__name__, "as expected")
