"""Tests of ndjson_sse_proxy. They read as its specification: each name says situation and outcome.

FakeOllama plays exact bytes over a real socket; most of them were recorded from a real Ollama.
Nothing here sleeps: tests wait on events, or on a socket, with a deadline.
"""
from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import doctest
import pytest

import ndjson_sse_proxy as proxy_module
from ndjson_sse_proxy import (
    ChatStream, Config, DemoOllama, NdjsonDecoder, ProxyError, ProxyServer, fold_chunks, parse_url,
    sse_event, to_ollama_chat, translate)

HERE = Path(__file__).parent
PROGRAM = HERE / "ndjson_sse_proxy.py"
DEADLINE = 10  # seconds; only a test that fails waits so long

# ---- Recordings of a real Ollama ---------------------------------------------------------------
# Byte for byte as they came off the socket; the two that die in the middle are shortened by whole
# records. The functions put back what all recordings of a kind have in common.


def stream(date, lines):
    """A chunked NDJSON answer, a line a chunk."""
    head = ("HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
            f"Date: {date}\r\nTransfer-Encoding: chunked\r\n\r\n")
    chunks = [line.encode() + b"\n" for line in lines.strip("\n").split("\n")]
    return head.encode() + b"".join(map(chunk, chunks)) + b"0\r\n\r\n"


def whole(status, content_type, date, text, chunked):
    """An answer in one piece."""
    body = text.encode()
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nDate: {date}\r\n{length}\r\n\r\n"
    return head.encode() + (chunk(body) + b"0\r\n\r\n" if chunked else body)


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


RECORDED = {
    "hello": stream("Sun, 22 Nov 2026 22:21:53 GMT", r'''
{"model":"hello","created_at":"2026-11-22T22:21:53.400636945Z","message":{"role":"assistant","content":"Hello"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.401268468Z","message":{"role":"assistant","content":" from"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.405045384Z","message":{"role":"assistant","content":" a"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.408893416Z","message":{"role":"assistant","content":" tiny"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.412752305Z","message":{"role":"assistant","content":" model"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.416648369Z","message":{"role":"assistant","content":":"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.420467968Z","message":{"role":"assistant","content":" "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.427694873Z","message":{"role":"assistant","content":"你"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.43822739Z","message":{"role":"assistant","content":"好"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.442045548Z","message":{"role":"assistant","content":" 🙂"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.445951186Z","message":{"role":"assistant","content":" naï"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.449790175Z","message":{"role":"assistant","content":"ve"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.453672739Z","message":{"role":"assistant","content":"."},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.457578487Z","message":{"role":"assistant","content":"\n"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.461521511Z","message":{"role":"assistant","content":"Se"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.465275052Z","message":{"role":"assistant","content":"cond"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.469219158Z","message":{"role":"assistant","content":" line"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.473058367Z","message":{"role":"assistant","content":","},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.476830436Z","message":{"role":"assistant","content":" with"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.480876173Z","message":{"role":"assistant","content":" \""},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.484913738Z","message":{"role":"assistant","content":"qu"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.488766027Z","message":{"role":"assistant","content":"otes"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.492630864Z","message":{"role":"assistant","content":"\"."},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:53.496986504Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":1427445221,"load_duration":1322264664,"prompt_eval_count":9,"prompt_eval_duration":3779000,"eval_count":27,"eval_duration":98569000}
'''),
    "think": stream("Sun, 22 Nov 2026 22:21:54 GMT", r'''
{"model":"think","created_at":"2026-11-22T22:21:54.946313708Z","message":{"role":"assistant","content":"","thinking":"Le"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.950094721Z","message":{"role":"assistant","content":"","thinking":"t"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.953917325Z","message":{"role":"assistant","content":"","thinking":" "},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.957640922Z","message":{"role":"assistant","content":"","thinking":"me"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.961329907Z","message":{"role":"assistant","content":"","thinking":" consid"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.965086192Z","message":{"role":"assistant","content":"","thinking":"er"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.968807275Z","message":{"role":"assistant","content":"","thinking":" it"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.972500346Z","message":{"role":"assistant","content":"","thinking":" ca"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.976186106Z","message":{"role":"assistant","content":"","thinking":"r"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.979841671Z","message":{"role":"assistant","content":"","thinking":"efully"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.983510826Z","message":{"role":"assistant","content":"","thinking":"."},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:54.987086913Z","message":{"role":"assistant","content":"","thinking":"\n"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.004834497Z","message":{"role":"assistant","content":"Fort"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.008754186Z","message":{"role":"assistant","content":"y"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.012525123Z","message":{"role":"assistant","content":" tw"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.016214088Z","message":{"role":"assistant","content":"o"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.019926869Z","message":{"role":"assistant","content":","},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.023756223Z","message":{"role":"assistant","content":" of"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.027469124Z","message":{"role":"assistant","content":" course"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.031158219Z","message":{"role":"assistant","content":"!"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.035524624Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":1437103544,"load_duration":1330616227,"prompt_eval_count":9,"prompt_eval_duration":4050000,"eval_count":28,"eval_duration":99393000}
'''),
    "think_format": stream("Sun, 22 Nov 2026 22:21:55 GMT", r'''
{"model":"think","created_at":"2026-11-22T22:21:55.162357067Z","message":{"role":"assistant","content":"","thinking":"Le"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.165941326Z","message":{"role":"assistant","content":"","thinking":"t"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.169483291Z","message":{"role":"assistant","content":"","thinking":" "},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.173064496Z","message":{"role":"assistant","content":"","thinking":"me"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.180538459Z","message":{"role":"assistant","content":"","thinking":" consid"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.180553441Z","message":{"role":"assistant","content":"","thinking":"er"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.183108163Z","message":{"role":"assistant","content":"","thinking":" it"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.186686163Z","message":{"role":"assistant","content":"","thinking":" ca"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.190412774Z","message":{"role":"assistant","content":"","thinking":"r"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.193941279Z","message":{"role":"assistant","content":"","thinking":"efully"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.197774269Z","message":{"role":"assistant","content":"","thinking":"."},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.201419248Z","message":{"role":"assistant","content":"","thinking":"\n"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.220673771Z","message":{"role":"assistant","content":""},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.258664543Z","message":{"role":"assistant","content":"{\n\n"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.294384797Z","message":{"role":"assistant","content":"         "},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.319535348Z","message":{"role":"assistant","content":" }"},"done":false}
{"model":"think","created_at":"2026-11-22T22:21:55.338064539Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":199089199,"load_duration":1051869,"prompt_eval_count":26,"prompt_eval_duration":28794000,"eval_count":4,"eval_duration":78931000}
'''),
    "tool": stream("Sun, 22 Nov 2026 22:21:56 GMT", r'''
{"model":"tool","created_at":"2026-11-22T22:21:56.469530316Z","message":{"role":"assistant","content":"","tool_calls":[{"id":"call_yrnoeg3h","function":{"index":0,"name":"get_weather","arguments":{"city":"Paris"}}}]},"done":false}
{"model":"tool","created_at":"2026-11-22T22:21:56.485808556Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":1146534072,"load_duration":1075303879,"prompt_eval_count":49,"prompt_eval_duration":4073000,"eval_count":18,"eval_duration":63266000}
'''),
    "parallel": stream("Sun, 22 Nov 2026 22:22:36 GMT", r'''
{"model":"tool2","created_at":"2026-11-22T22:22:36.856490393Z","message":{"role":"assistant","content":"Let"},"done":false}
{"model":"tool2","created_at":"2026-11-22T22:22:36.85652886Z","message":{"role":"assistant","content":" me"},"done":false}
{"model":"tool2","created_at":"2026-11-22T22:22:36.857413671Z","message":{"role":"assistant","content":" check"},"done":false}
{"model":"tool2","created_at":"2026-11-22T22:22:36.861157407Z","message":{"role":"assistant","content":".\n"},"done":false}
{"model":"tool2","created_at":"2026-11-22T22:22:36.912286045Z","message":{"role":"assistant","content":"","tool_calls":[{"id":"call_4fllz4pc","function":{"index":0,"name":"get_weather","arguments":{"city":"Paris"}}}]},"done":false}
{"model":"tool2","created_at":"2026-11-22T22:22:36.977178291Z","message":{"role":"assistant","content":"","tool_calls":[{"id":"call_1xjvo761","function":{"index":1,"name":"get_weather","arguments":{"city":"Oslo"}}}]},"done":false}
{"model":"tool2","created_at":"2026-11-22T22:22:36.992316722Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":1566361385,"load_duration":1416538680,"prompt_eval_count":49,"prompt_eval_duration":4331000,"eval_count":40,"eval_duration":141310000}
'''),
    "length": stream("Sun, 22 Nov 2026 22:19:43 GMT", r'''
{"model":"hello","created_at":"2026-11-22T22:19:43.020424704Z","message":{"role":"assistant","content":"Hello"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:19:43.021066042Z","message":{"role":"assistant","content":" from"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:19:43.024579875Z","message":{"role":"assistant","content":" a"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:19:43.025478666Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"length","total_duration":15956151,"load_duration":1126201,"prompt_eval_count":9,"prompt_eval_duration":3992000,"eval_count":3,"eval_duration":6829000}
'''),
    "stop": stream("Sun, 22 Nov 2026 22:19:43 GMT", r'''
{"model":"hello","created_at":"2026-11-22T22:19:43.055622068Z","message":{"role":"assistant","content":"Hello"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:19:43.056362022Z","message":{"role":"assistant","content":" from"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:19:43.059819592Z","message":{"role":"assistant","content":" a"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:19:43.063981943Z","message":{"role":"assistant","content":" tiny"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:19:43.068599354Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":24444107,"load_duration":1038339,"prompt_eval_count":9,"prompt_eval_duration":3838000,"eval_count":5,"eval_duration":15135000}
'''),
    "generate": stream("Sun, 22 Nov 2026 22:21:58 GMT", r'''
{"model":"hello","created_at":"2026-11-22T22:21:58.008398098Z","response":"Hello","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.010031255Z","response":" from","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.012940897Z","response":" a","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.015861976Z","response":" tiny","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.019060228Z","response":" model","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.022183639Z","response":":","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.02512557Z","response":" ","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.031081147Z","response":"你","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.039645757Z","response":"好","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.042674898Z","response":" 🙂","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.045621425Z","response":" naï","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.048752908Z","response":"ve","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.051765253Z","response":".","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.054719872Z","response":"\n","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.057949972Z","response":"Se","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.060932873Z","response":"cond","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.063901133Z","response":" line","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.066859718Z","response":",","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.0699639Z","response":" with","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.073024537Z","response":" \"","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.076004584Z","response":"qu","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.079058391Z","response":"otes","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.082138117Z","response":"\".","done":false}
{"model":"hello","created_at":"2026-11-22T22:21:58.085734314Z","response":"","done":true,"done_reason":"stop","context":[151644,872,198,6023,151645,198,151644,77091,16600,9707,504,264,13673,1614,25,220,108386,27484,94880,586,624,15666,1555,11,448,330,53282,3263],"total_duration":84676369,"load_duration":841976,"prompt_eval_count":9,"prompt_eval_duration":3215000,"eval_count":27,"eval_duration":78378000}
'''),
    "die_mid": stream("Sun, 22 Nov 2026 22:21:14 GMT", r'''
{"model":"loop","created_at":"2026-11-22T22:21:14.404422619Z","message":{"role":"assistant","content":"O"},"done":false}
{"model":"loop","created_at":"2026-11-22T22:21:14.405847375Z","message":{"role":"assistant","content":"ne"},"done":false}
{"model":"loop","created_at":"2026-11-22T22:21:14.410159199Z","message":{"role":"assistant","content":" two"},"done":false}
{"model":"loop","created_at":"2026-11-22T22:21:14.41427427Z","message":{"role":"assistant","content":" thr"},"done":false}
{"model":"loop","created_at":"2026-11-22T22:21:14.41828849Z","message":{"role":"assistant","content":"ee"},"done":false}
{"error":"an error was encountered while running the model: unexpected EOF"}
'''),
    "die_mid_generate": stream("Sun, 22 Nov 2026 22:21:16 GMT", r'''
{"model":"loop","created_at":"2026-11-22T22:21:16.712419052Z","response":"O","done":false}
{"model":"loop","created_at":"2026-11-22T22:21:16.716354034Z","response":"ne","done":false}
{"model":"loop","created_at":"2026-11-22T22:21:16.718457944Z","response":" two","done":false}
{"model":"loop","created_at":"2026-11-22T22:21:16.722192937Z","response":" thr","done":false}
{"model":"loop","created_at":"2026-11-22T22:21:16.745772574Z","response":"ee","done":false}
{"error":"an error was encountered while running the model: unexpected EOF"}
'''),
    "hello_whole": whole("200 OK", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:21:53 GMT", r'''{"model":"hello","created_at":"2026-11-22T22:21:53.596884368Z","message":{"role":"assistant","content":"Hello from a tiny model: 你好 🙂 naïve.\nSecond line, with \"quotes\"."},"done":true,"done_reason":"stop","total_duration":98387329,"load_duration":1001154,"prompt_eval_count":9,"prompt_eval_duration":3912000,"eval_count":27,"eval_duration":90075000}''', chunked=False),
    "load": whole("200 OK", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:19:43 GMT", r'''{"model":"hello","created_at":"2026-11-22T22:19:43.105264087Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"load"}''', chunked=False),
    "unload": whole("200 OK", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:21:58 GMT", r'''{"model":"hello","created_at":"2026-11-22T22:21:58.134281549Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"unload"}''', chunked=False),
    "tags": whole("200 OK", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:20:03 GMT", r'''{"models":[{"name":"tool:latest","model":"tool:latest","modified_at":"2026-11-22T22:18:01.767920994Z","size":83951715,"digest":"bd97a3694407b843656dd6be17701fd05f124de988576f26b8298477ef1646d6","details":{"parent_model":"","format":"gguf","family":"llama","families":["llama"],"parameter_size":"39.01M","quantization_level":"F16","context_length":4096,"embedding_length":128},"capabilities":["completion","tools"]},{"name":"loop:latest","model":"loop:latest","modified_at":"2026-11-22T22:18:00.091221651Z","size":83951486,"digest":"c1638b10fc9d49394092e2af63a80d75cb801af7fa1c81f5f3dddf2f042ab8bb","details":{"parent_model":"","format":"gguf","family":"llama","families":["llama"],"parameter_size":"39.01M","quantization_level":"F16","context_length":4096,"embedding_length":128},"capabilities":["completion"]},{"name":"think:latest","model":"think:latest","modified_at":"2026-11-22T22:18:00.958611804Z","size":83951621,"digest":"beed219d09c62cd4bd1fe05505a3f5a66bb8b581f29e3601b8414569cda79213","details":{"parent_model":"","format":"gguf","family":"llama","families":["llama"],"parameter_size":"39.01M","quantization_level":"F16","context_length":4096,"embedding_length":128},"capabilities":["completion","thinking"]},{"name":"hello:latest","model":"hello:latest","modified_at":"2026-11-22T22:17:59.209518154Z","size":83951486,"digest":"9ad1593752fe66d5124fe5dffc9cbefee99aceb3206ce1b3a19b24fde9abe0a6","details":{"parent_model":"","format":"gguf","family":"llama","families":["llama"],"parameter_size":"39.01M","quantization_level":"F16","context_length":4096,"embedding_length":128},"capabilities":["completion"]}]}''', chunked=False),
    "notfound": whole("404 Not Found", "text/plain", "Sun, 22 Nov 2026 22:20:03 GMT", r'''404 page not found''', chunked=False),
    "missing": whole("404 Not Found", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:19:43 GMT", r'''{"error":"model 'nosuch' not found"}''', chunked=False),
    "badopt": whole("500 Internal Server Error", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:20:03 GMT", r'''{"error":"option \"num_ctx\" must be of type integer"}''', chunked=False),
    "badfmt": whole("500 Internal Server Error", "application/json", "Sun, 22 Nov 2026 22:20:03 GMT", r'''{"error":"invalid format: \"\\\"yaml\\\"\"; expected \"json\" or a valid JSON Schema object"}''', chunked=True),
    "think_bad": whole("400 Bad Request", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:20:03 GMT", r'''{"error":"invalid think value: \"extreme\" (must be \"high\", \"medium\", \"low\", \"max\", true, or false)"}''', chunked=False),
    "keepalive_bad": whole("400 Bad Request", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:21:58 GMT", r'''{"error":"time: invalid duration \"soon\""}''', chunked=False),
    "toolargs_string": whole("400 Bad Request", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:21:56 GMT", r'''{"error":"Value looks like object, but can't find closing '}' symbol"}''', chunked=False),
    "think_on_hello": whole("400 Bad Request", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:19:42 GMT", r'''{"error":"\"hello\" does not support thinking"}''', chunked=False),
    "tools_on_hello": whole("400 Bad Request", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:19:43 GMT", r'''{"error":"registry.ollama.ai/library/hello:latest does not support tools"}''', chunked=False),
    "over_trunc_false": whole("400 Bad Request", "application/json", "Sun, 22 Nov 2026 22:20:44 GMT", r'''{"error":"{\"error\":{\"code\":400,\"message\":\"request (9009 tokens) exceeds the available context size (4096 tokens), try increasing it\",\"type\":\"exceed_context_size_error\",\"n_prompt_tokens\":9009,\"n_ctx\":4096}}"}''', chunked=True),
    "hist_trunc_false": whole("400 Bad Request", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:20:47 GMT", r'''{"error":"{\"error\":{\"code\":400,\"message\":\"request (6489 tokens) exceeds the available context size (4096 tokens), try increasing it\",\"type\":\"exceed_context_size_error\",\"n_prompt_tokens\":6489,\"n_ctx\":4096}}"}''', chunked=False),
    "over_shift_false": whole("400 Bad Request", "application/json", "Sun, 22 Nov 2026 22:20:46 GMT", r'''{"error":"the prompt is longer than the context length currently available to the model; shorten the prompt, adjust the context length in settings, or use a model with a longer context length"}''', chunked=True),
    "over_generate": whole("400 Bad Request", "application/json", "Sun, 22 Nov 2026 22:20:47 GMT", r'''{"error":"{\"error\":{\"code\":400,\"message\":\"request (9009 tokens) exceeds the available context size (4096 tokens), try increasing it\",\"type\":\"exceed_context_size_error\",\"n_prompt_tokens\":9009,\"n_ctx\":4096}}"}''', chunked=True),
    "images": whole("400 Bad Request", "application/json", "Sun, 22 Nov 2026 22:21:58 GMT", r'''{"error":"{\"error\":{\"code\":400,\"message\":\"Multimodal data provided, but model does not support multimodal requests.\",\"type\":\"invalid_request_error\"}}"}''', chunked=True),
    "generate_suffix": whole("400 Bad Request", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:21:58 GMT", r'''{"error":"registry.ollama.ai/library/hello:latest does not support insert"}''', chunked=False),
    "show_missing": whole("404 Not Found", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:20:03 GMT", r'''{"error":"model 'nosuch:latest' not found"}''', chunked=False),
    "version": whole("200 OK", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:20:03 GMT", r'''{"version":"0.0.0"}''', chunked=False),
}

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
FINAL = b'{"message":{"content":""},"done":true,"done_reason":"stop"}\n'


def says(text):
    """A record with some content, as a line."""
    return json.dumps({"message": {"role": "assistant", "content": text}, "done": False}).encode() + b"\n"


# ---- The servers and the client of the tests ---------------------------------------------------

RESET = object()  # a step: break the connection by RST


class FakeOllama:
    """Plays `steps` on each connection: bytes are sent, events are waited for, RESET resets.

    At the end it sends FIN and waits until the proxy has hung up, which sets `hung_up`.
    """

    def __init__(self, *steps, size=None):
        self.steps, self.size = steps, size  # size: send pieces of so many bytes
        self.requests = queue.Queue()  # (request line, headers, body)
        self.hung_up = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, connection):
        with contextlib.ExitStack() as stack:
            stack.callback(self.hung_up.set)
            stack.enter_context(contextlib.suppress(OSError))
            stack.enter_context(connection)
            connection.settimeout(DEADLINE)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = connection.makefile("rb")
            line = reader.readline().decode().rstrip()
            headers = http.client.parse_headers(reader)
            self.requests.put((line, headers, reader.read(int(headers.get("Content-Length", 0)))))
            for step in self.steps:
                if step is RESET:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    reader.close()
                    return
                if isinstance(step, threading.Event):
                    step.wait(DEADLINE)
                else:
                    size = self.size or len(step) or 1
                    for i in range(0, len(step), size):
                        connection.sendall(step[i:i + size])
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)

    def close(self):
        self.listener.close()


@pytest.fixture
def start(request):
    """start(*steps) -> (proxy, fake upstream); settings by name go to Config."""
    def start(*steps, size=None, upstream=None, **settings):
        fake = None if upstream else FakeOllama(*steps, size=size)
        config = Config(listen=parse_url("127.0.0.1:0"),
                        upstream=parse_url(upstream or fake.url), **settings)
        server = ProxyServer(config)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def stop():
            server.shutdown()
            server.server_close()
            thread.join(DEADLINE)
            if fake:
                fake.close()
        request.addfinalizer(stop)
        return server, fake
    return start


@pytest.fixture(scope="module")
def demo():
    """The URL of a proxy in front of the demo, without its pace."""
    upstream = DemoOllama(pace=0)
    server = ProxyServer(Config(listen=parse_url("127.0.0.1:0"), upstream=parse_url(upstream.url)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Answer:
    """What a client got. `cut`: the body ended before its end was said."""

    def __init__(self, response):
        self.status, self.headers, self.cut = response.status, response.headers, False
        try:
            self.body = response.read()
        except http.client.IncompleteRead as error:
            self.body, self.cut = error.partial, True

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The data of each frame; and the form of every frame is checked."""
        assert self.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert not self.body or self.body.endswith(b"\n\n")
        frames = self.body.decode().split("\n\n")[:-1]
        for frame in frames:
            assert frame.startswith("data: ") and len(frame.splitlines()) == 1, frame
        return [frame[6:] for frame in frames]

    def chunks(self):
        return [json.loads(data) for data in self.events() if data != "[DONE]"]

    def deltas(self, name="content"):
        return "".join(choice["delta"].get(name, "") for chunk in self.chunks()
                       for choice in chunk.get("choices", []))


def connect(server):
    return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=DEADLINE)


def call(server, method, path, body=None, headers=None):
    connection = connect(server)
    try:
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        connection.request(method, path, data, headers or {})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def chat(server, stream=True, **fields):
    return call(server, "POST", "/v1/chat/completions", {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream, **fields})


def assert_failed(answer, status=502, code=None):
    """The stream, or the whole answer, says that it failed and does not look finished."""
    if answer.status == 200:
        events = answer.events()
        assert "[DONE]" not in events and not answer.cut
        error = json.loads(events[-1])
        assert "choices" not in error
        assert not any('"finish_reason":"' in data for data in events)
    else:
        assert answer.status == status
        error = answer.json()
    assert sorted(error["error"]) == ["code", "message", "param", "type"]
    if code:
        assert error["error"]["code"] == code
    return error["error"]


# ---- 3. NDJSON in ------------------------------------------------------------------------------


def test_ndjson_split_at_every_byte_gives_the_same_records():
    data = '{"a":"你好 🙂"}\r\n\n  {"b":2}\n{"c":[3]}\n'.encode()
    expected = [{"a": "你好 🙂"}, {"b": 2}, {"c": [3]}]
    for i in range(len(data) + 1):
        decoder = NdjsonDecoder()
        pieces = [*decoder.feed(data[:i]), *decoder.feed(data[i:]), *decoder.close()]
        assert [record for _, record in pieces] == expected
    decoder = NdjsonDecoder()
    records = [r for i in range(len(data)) for _, r in decoder.feed(data[i:i + 1])]
    assert records == expected


def test_ndjson_last_line_without_newline_is_a_record():
    decoder = NdjsonDecoder()
    assert list(decoder.feed(b'{"a":1}')) == []
    assert list(decoder.close()) == [(b'{"a":1}', {"a": 1})]


def test_ndjson_end_inside_a_line_raises():
    decoder = NdjsonDecoder()
    list(decoder.feed(b'{"a":1}\n{"a":'))
    with pytest.raises(ProxyError, match="ended inside a line"):
        list(decoder.close())


@pytest.mark.parametrize("line", [
    b"[1]", b"1", b"null", b"7e", b"{", b"{'a':1}", b'{"a":NaN}', b'{"a":1e999}', b'{"a":"\xff"}',
    b'{"a":1}{"b":2}', b"\xef\xbb\xbf{}", b"<html>", b'{"a":' + b"[" * 100_000])
def test_ndjson_line_that_is_no_object_raises_after_the_good_ones(line):
    records = NdjsonDecoder().feed(b'{"good":1}\n' + line + b"\n")
    assert next(records)[1] == {"good": 1}
    with pytest.raises(ProxyError) as error:
        next(records)
    assert (error.value.status, error.value.code) == (502, "upstream_protocol")


def test_ndjson_line_without_end_is_refused_at_the_cap():
    decoder = NdjsonDecoder(max_line=100)
    assert list(decoder.feed(b"x" * 100)) == []
    with pytest.raises(ProxyError, match="more than 100 bytes"):
        list(decoder.feed(b"x"))


# ---- 4. SSE out --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "a\nb", "a\r\nb", "a\rb", "\n\n", "a\u2028b\u2029c\x85d", "\x00\x0b\x0c\x1c", "data: x\n\n", "🙂",
    "\ud83d"])
def test_frame_stays_one_line_whatever_the_text(text):
    frame = sse_event({"t": text})
    lines = frame.decode().splitlines()
    assert frame.endswith(b"\n\n") and len(lines) == 2 and lines[1] == ""
    assert json.loads(lines[0][len("data: "):]) == {"t": text}


# ---- 5. Request --------------------------------------------------------------------------------


def native(**fields):
    """What goes up for a chat with these fields."""
    return to_ollama_chat({"model": "m", "messages": [], **fields}).body


@pytest.mark.parametrize("sent, place, value", [
    ({"max_tokens": 5}, "num_predict", 5),
    ({"max_completion_tokens": 6}, "num_predict", 6),
    ({"max_completion_tokens": 6, "max_tokens": 5}, "num_predict", 6),
    ({"max_tokens": 5, "options": {"num_predict": 9}}, "num_predict", 5),
    ({"temperature": 0}, "temperature", 0), ({"top_p": 0.5}, "top_p", 0.5), ({"seed": 7}, "seed", 7),
    ({"stop": "x"}, "stop", ["x"]), ({"stop": ["x", "y"]}, "stop", ["x", "y"]),
    ({"presence_penalty": -1}, "presence_penalty", -1),
    ({"frequency_penalty": 1.5}, "frequency_penalty", 1.5),
    ({"options": {"num_ctx": 2048}}, "num_ctx", 2048),
])
def test_field_becomes_an_option(sent, place, value):
    assert native(**sent)["options"] == {place: value}


@pytest.mark.parametrize("sent, place, value", [
    ({"reasoning_effort": "none"}, "think", False), ({"reasoning_effort": "minimal"}, "think", "low"),
    ({"reasoning_effort": "xhigh"}, "think", "max"), ({"think": True}, "think", True),
    ({"think": True, "reasoning_effort": "low"}, "think", "low"),
    ({"keep_alive": "5m"}, "keep_alive", "5m"), ({"keep_alive": -1}, "keep_alive", -1),
    ({"truncate": True}, "truncate", True),
    ({"response_format": {"type": "json_object"}}, "format", "json"),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "schema": {"type": "object"}}}}, "format", {"type": "object"}),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools",
     [{"type": "function", "function": {"name": "f"}}]),
])
def test_field_becomes_a_native_field(sent, place, value):
    assert native(**sent)[place] == value


def test_fields_not_sent_or_null_stay_out_so_that_the_modelfile_holds():
    body = native(temperature=None, stop=None, tools=None, response_format={"type": "text"})
    assert body["options"] == {}
    assert body.get("format") is None and "tools" not in body and "think" not in body


def test_every_chat_goes_up_streamed_and_never_truncated_nor_shifted():
    body = native(stream=False)
    assert body["stream"] is True and body["truncate"] is False and "shift" not in body
    assert to_ollama_chat({"model": "m", "messages": []}, True).body["truncate"] is True


@pytest.mark.parametrize("field, value", [
    ("model", 1), ("messages", {}), ("stream", "yes"), ("stream_options", True), ("max_tokens", "9"),
    ("max_tokens", True), ("max_completion_tokens", 1.5), ("temperature", "hot"), ("top_p", []),
    ("seed", 1.5), ("stop", 5), ("stop[1]", ["a", 1]), ("tools", {}), ("tools[0]", [1]),
    ("tools[0].type", [{"type": "web_search"}]), ("tools[0].function", [{"type": "function"}]),
    ("tools[0].function.name", [{"type": "function", "function": {}}]), ("reasoning_effort", "huge"),
    ("response_format", "json"), ("response_format.type", {"type": "xml"}),
    ("response_format.json_schema", {"type": "json_schema"}),
    ("response_format.json_schema.schema", {"type": "json_schema", "json_schema": {"name": "n"}}),
    ("options", []), ("keep_alive", []), ("think", 1), ("truncate", 1),
    ("stream_options.include_usage", {"include_usage": "yes"}),
    ("messages[0]", ["hi"]), ("messages[0].role", [{"content": "hi"}]),
    ("messages[0].role", [{"role": "robot"}]), ("messages[0].content", [{"role": "user", "content": 1}]),
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "video"}]}]),
    ("messages[0].content[0].text", [{"role": "user", "content": [{"type": "text", "text": 1}]}]),
    ("messages[0].tool_calls[0].function", [{"role": "assistant", "tool_calls": [{"id": "1"}]}]),
])
def test_value_of_the_wrong_type_is_a_400_that_names_the_field(field, value):
    with pytest.raises(ProxyError) as error:
        native(**{re.split(r"[.\[]", field)[0]: value})
    assert error.value.status == 400 and error.value.param == field
    assert field in error.value.message


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_field_is_a_400_that_names_it(field):
    body = {"model": "m", "messages": []}
    del body[field]
    with pytest.raises(ProxyError, match=field) as error:
        to_ollama_chat(body)
    assert error.value.status == 400


def test_conversation_with_tools_keeps_order_and_count_and_matches_results_to_calls():
    arguments = ['{"city":"Paris"}', "", "not json", "[1]"]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "refusal": None,
         "tool_calls": [{"id": f"c{i}", "type": "function", "function": {"name": f"f{i}", "arguments": a}}
                        for i, a in enumerate(arguments)]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert native(messages=messages)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [
            {"id": f"c{i}", "function": {"index": i, "name": f"f{i}",
                                         "arguments": {"city": "Paris"} if i == 0 else {}}}
            for i in range(4)]},
        {"role": "tool", "tool_call_id": "c1", "tool_name": "f1", "content": "sunny"},
    ]


# ---- 6. Stream ---------------------------------------------------------------------------------


def new_stream(**kwargs):
    return ChatStream("m", "chatcmpl-x", 1700000000, **kwargs)


def test_tool_calls_are_counted_over_the_whole_stream_and_get_unique_ids():
    def calls(*ids):
        return {"message": {"content": "", "tool_calls": [
            {**({"id": i} if i else {}), "function": {"index": 0, "name": "f", "arguments": {"a": 1}}}
            for i in ids]}}
    s = new_stream()
    chunks = [c for r in [calls("a", ""), calls("a", "b"), {"done": True}] for c in s.feed(r)]
    sent = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks
            if "tool_calls" in c["choices"][0]["delta"]]
    assert [call["index"] for call in sent] == [0, 1, 2, 3]
    ids = [call["id"] for call in sent]
    assert len(set(ids)) == 4 and ids[0] == "a" and ids[3] == "b" and all(ids)
    assert all(len(i) <= 40 for i in ids)  # OpenAI's limit, when they come back
    assert sent[0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("reason, calls, expected", [
    ("stop", False, "stop"), ("length", False, "length"), (None, False, "stop"), ("load", False, "stop"),
    ("unload", False, "stop"), ("stop", True, "tool_calls"), ("length", True, "length")])
def test_finish_reason_is_one_that_openai_knows(reason, calls, expected):
    message = {"content": "x"}
    if calls:
        message["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    s = new_stream()
    chunks = list(s.feed({"message": message, "done": True, "done_reason": reason}))
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == expected
    assert sum(c["choices"][0]["finish_reason"] is not None for c in chunks) == 1


def test_record_with_thinking_content_and_call_becomes_one_delta_each():
    s = new_stream()
    chunks = s.feed({"message": {"thinking": "t", "content": "c", "tool_calls": [
        {"id": "i", "function": {"name": "f", "arguments": {}}}]}})
    assert [sorted(c["choices"][0]["delta"]) for c in chunks] == [
        ["content", "role"], ["reasoning", "reasoning_content"], ["content"], ["tool_calls"]]


@pytest.mark.parametrize("record", [
    {}, {"message": None}, {"message": "x"}, {"message": {"content": 1}}, {"message": {"thinking": []}},
    {"message": {"tool_calls": {}}}, {"message": {"tool_calls": [1]}},
    {"message": {"tool_calls": [{"id": 1, "function": {"name": "f"}}]}},
    {"message": {"tool_calls": [{"function": {}}]}}, {"message": {"tool_calls": [{}]}},
    {"message": {}, "done": True, "eval_count": "9"}])
def test_record_of_the_wrong_shape_is_a_breach_of_protocol(record):
    s = new_stream(usage=True)
    with pytest.raises(ProxyError) as error:
        list(s.feed(record))
    assert (error.value.status, error.value.code, s.state) == (502, "upstream_protocol", "FAILED")


def test_nothing_may_follow_the_end_nor_an_error():
    done, failed = new_stream(), new_stream()
    list(done.feed({"done": True}))
    with pytest.raises(ProxyError, match="died"):
        list(failed.feed({"error": "died"}))
    for s in done, failed:
        with pytest.raises(ProxyError, match="after"):
            list(s.feed({"message": {"content": "x"}}))
    done.close()
    with pytest.raises(ProxyError, match="cut"):
        failed.close()


def test_usage_of_a_cached_prompt_counts_as_zero():
    s = new_stream(usage=True)
    chunks = list(s.feed({"message": {}, "done": True, "eval_count": 3}))
    assert chunks[-1]["usage"] == {"prompt_tokens": 0, "completion_tokens": 3, "total_tokens": 3}
    assert chunks[-1]["choices"] == []


def test_middle_of_the_program_runs_on_bytes_alone():
    body = says("Hel") + says("lo") + FINAL
    chunks = translate([body[i:i + 1] for i in range(len(body))], new_stream())
    answer = fold_chunks(chunks)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}


# ---- Chat, end to end, on recordings -----------------------------------------------------------

HELLO = "Hello from a tiny model: 你好 🙂 naïve.\nSecond line, with \"quotes\"."


@pytest.mark.parametrize("size", [None, 1, 7])
def test_recorded_text_streams_in_openai_form_however_it_is_split(start, size):
    server, fake = start(RECORDED["hello"], size=size)
    answer = chat(server, stream_options={"include_usage": True})
    assert answer.status == 200 and answer.events()[-1] == "[DONE]"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["X-Request-Id"].startswith("req_")
    chunks = answer.chunks()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert sum("role" in c["choices"][0]["delta"] for c in chunks[:-1]) == 1
    assert answer.deltas() == HELLO
    assert chunks[-2]["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 9, "completion_tokens": 27, "total_tokens": 36}
    for c in chunks:
        assert c["object"] == "chat.completion.chunk" and c["model"] == "m"
        assert c["system_fingerprint"] == "fp_ollama" and isinstance(c["created"], int)
        assert c["id"] == chunks[0]["id"] and re.fullmatch(r"chatcmpl-\w{16,}", c["id"])
    assert fake.hung_up.wait(DEADLINE)


def test_usage_comes_only_when_asked_for(start):
    server, _ = start(RECORDED["hello"])
    assert not any("usage" in c for c in chat(server).chunks())


@pytest.mark.parametrize("size", [None, 1])
def test_recorded_text_as_a_whole_answer(start, size):
    server, _ = start(RECORDED["hello"], size=size)
    answer = chat(server, stream=False).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "m"
    assert answer["choices"] == [{"index": 0, "finish_reason": "stop", "message": {
        "role": "assistant", "content": HELLO}}]
    assert answer["usage"]["total_tokens"] == 36


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("name, content", [("think", "Forty two, of course!"), ("think_format", None)])
def test_recorded_thinking_goes_out_under_both_names_before_the_content(start, size, name, content):
    server, _ = start(RECORDED[name], size=size)
    answer = chat(server)
    thought = "Let me consider it carefully.\n"
    assert answer.deltas("reasoning").strip() == thought.strip()
    assert answer.deltas("reasoning_content") == answer.deltas("reasoning")
    assert answer.events()[-1] == "[DONE]"
    if content:
        assert answer.deltas() == content
    message = chat(server, stream=False).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == answer.deltas("reasoning")
    assert message["content"] == answer.deltas()


def test_recorded_tool_call_goes_out_whole(start):
    server, _ = start(RECORDED["tool"])
    choices = [c["choices"][0] for c in chat(server).chunks()]
    assert choices[1]["delta"] == {"tool_calls": [{
        "index": 0, "id": "call_yrnoeg3h", "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}]}
    assert choices[-1] == {"index": 0, "delta": {}, "finish_reason": "tool_calls"}
    message = chat(server, stream=False).json()["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [{
        "id": "call_yrnoeg3h", "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}]


def test_recorded_text_and_two_calls(start):
    server, _ = start(RECORDED["parallel"])
    answer = chat(server, stream=False).json()["choices"][0]
    assert answer["message"]["content"] == "Let me check.\n"
    assert [json.loads(c["function"]["arguments"])["city"] for c in answer["message"]["tool_calls"]] == [
        "Paris", "Oslo"]
    assert answer["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("name, reason, text", [
    ("length", "length", "Hello from a"), ("stop", "stop", "Hello from a tiny")])
def test_recorded_ends_keep_their_reason(start, name, reason, text):
    server, _ = start(RECORDED[name])
    choice = chat(server, stream=False).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == (reason, text)


@pytest.mark.parametrize("name", ["load", "unload"])
def test_chat_without_messages_loads_the_model_and_ends_well(start, name):
    server, _ = start(RECORDED[name])
    answer = chat(server, messages=[])
    assert answer.events()[-1] == "[DONE]"
    assert [c["choices"][0]["finish_reason"] for c in answer.chunks()] == [None, "stop"]


def test_request_goes_up_as_native_chat(start):
    server, fake = start(RECORDED["hello"])
    answer = chat(server, stream=False, max_tokens=5, colour="red", options={"num_ctx": 99})
    line, headers, body = fake.requests.get(timeout=DEADLINE)
    assert line == "POST /api/chat HTTP/1.1" and headers["Content-Type"] == "application/json"
    assert json.loads(body) == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True,
        "truncate": False, "options": {"num_ctx": 99, "num_predict": 5}}
    assert answer.headers["X-Ignored-Fields"] == "colour"


def test_clients_keys_never_reach_the_upstream(start):
    server, fake = start(RECORDED["hello"], RECORDED["hello"])
    for path in "/v1/chat/completions", "/api/chat":
        call(server, "POST", path, {"model": "m", "messages": []}, {
            "Authorization": "Bearer secret", "x-api-key": "secret", "Cookie": "secret"})
        assert "secret" not in str(fake.requests.get(timeout=DEADLINE)[1])


# ---- Errors and false endings ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name, status, code, param, text", [
    ("missing", 404, "model_not_found", "model", "ollama pull nosuch"),
    ("badopt", 400, None, "options.num_ctx", 'option "num_ctx" must be of type integer'),
    ("badfmt", 400, None, "response_format", "invalid format"),
    ("think_bad", 400, None, "think", "invalid think value"),
    ("keepalive_bad", 400, None, "keep_alive", "invalid duration"),
    ("toolargs_string", 400, "upstream_error", None, "Value looks like object"),
    ("think_on_hello", 400, None, "think", "does not support thinking"),
    ("tools_on_hello", 400, None, "tools", "does not support tools"),
    ("over_trunc_false", 400, "context_length_exceeded", "messages", "4096 tokens. However"),
    ("hist_trunc_false", 400, "context_length_exceeded", "messages", "6489 tokens"),
    ("over_shift_false", 400, "context_length_exceeded", "messages", "num_ctx"),
    ("notfound", 502, "upstream_protocol", None, "Is that an Ollama?"),
])
def test_recorded_refusal_keeps_its_status_and_says_what_to_do(start, stream, name, status, code, param,
                                                               text):
    server, _ = start(RECORDED[name])
    answer = chat(server, stream=stream)
    error = assert_failed(answer, status, code)
    assert answer.status == status
    assert error["param"] == param and error["code"] == code and text in error["message"]
    assert "\\" not in error["message"].replace('\\"', "") or name == "badfmt"
    kind = {404: "not_found_error", 400: "invalid_request_error", 502: "server_error"}[status]
    assert error["type"] == kind


def test_context_overflow_names_figures_and_cure(start):
    server, _ = start(RECORDED["over_trunc_false"])
    message = chat(server).json()["error"]["message"]
    assert message.startswith("This model's maximum context length is 4096 tokens")
    assert "9009" in message and "num_ctx" in message and "--allow-truncation" in message


@pytest.mark.parametrize("size", [None, 1])
def test_recorded_death_of_the_runner_is_an_error_frame(start, size):
    server, _ = start(RECORDED["die_mid"], size=size)
    answer = chat(server)
    assert answer.status == 200 and answer.deltas().startswith("One two")
    error = assert_failed(answer, code="upstream_error")
    assert error["message"] == "an error was encountered while running the model: unexpected EOF"
    assert_failed(chat(server, stream=False), 502, "upstream_error")


def test_error_line_before_the_first_record_keeps_a_status(start):
    server, _ = start(HEAD + chunk(b'{"error":"model \'x\' not found"}\n') + b"0\r\n\r\n")
    assert chat(server).status == 404


SAID = HEAD + chunk(says("some"))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("steps, code", [
    ((b"",), "upstream_cut"),
    ((b"HTTP/1.1 200 OK\r\n",), None),
    ((b"garbage\r\n\r\n",), "upstream_protocol"),
    ((HEAD,), "upstream_cut"),
    ((SAID,), "upstream_cut"),
    ((SAID, RESET), "upstream_cut"),
    ((SAID + b"0\r\n\r\n",), "upstream_cut"),
    ((SAID + b"20\r\n{\"message\":",), "upstream_cut"),
    ((SAID + b"xyz\r\n",), "upstream_cut"),
    ((SAID + b"-5\r\nabc\r\n",), None),
    ((SAID + chunk(b'{"message":{"content":"cut in the middle') + b"0\r\n\r\n",), "upstream_cut"),
    ((SAID + chunk(b"<html>\n"),), "upstream_protocol"),
    ((SAID + chunk(b'{"message":{"content":5}}\n'),), "upstream_protocol"),
    ((SAID + chunk(b"x" * (5 << 20)),), "upstream_protocol"),
    ((HEAD.replace(b"Transfer-Encoding: chunked", b"Content-Length: 999") + says("some"),), "upstream_cut"),
    ((HEAD.replace(b"Transfer-Encoding: chunked", b"Connection: close") + says("some"),), "upstream_cut"),
    ((b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",), "upstream_protocol"),
    ((b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>",), None),
])
def test_upstream_that_is_cut_or_garbled_never_looks_finished(start, stream, steps, code):
    server, _ = start(*steps)
    assert_failed(chat(server, stream=stream), 502, code)


@pytest.mark.parametrize("ending", [(), (RESET,)])
def test_recording_cut_after_every_seventh_byte_never_looks_finished(start, ending):
    recording = RECORDED["length"]
    end = recording.index(b'"done":true')
    server, fake = start()
    for i in range(0, end, 7):
        fake.steps = (recording[:i], *ending)
        assert_failed(chat(server, stream=i % 2 == 0), 502)


def test_silent_upstream_is_a_504_or_an_error_frame(start):
    never = threading.Event()
    server, fake = start(never, idle_timeout=0.1)
    assert_failed(chat(server), 504, "upstream_timeout")
    fake.steps = (SAID, never)
    answer = chat(server)
    assert answer.status == 200
    assert_failed(answer, code="upstream_timeout")
    never.set()


def test_upstream_that_is_not_there_is_a_502_that_says_what_to_do(start):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server, _ = start(upstream=f"http://127.0.0.1:{port}")
    error = assert_failed(chat(server), 502, "upstream_unreachable")
    assert "ollama serve" in error["message"] and "--demo" in error["message"]
    assert f"127.0.0.1:{port}" in error["message"]


# ---- Raw frames --------------------------------------------------------------------------------

SSE = {"Accept": "text/event-stream"}


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("name, path", [("hello", "/api/chat"), ("generate", "/api/generate")])
def test_native_route_passes_bytes_or_makes_each_line_a_frame(start, size, name, path):
    server, fake = start(RECORDED[name], size=size)
    request = b'{"model": "hello",   "odd spacing": true}'
    plain = call(server, "POST", path, request)
    assert plain.headers["Content-Type"] == "application/x-ndjson"
    lines = [line for line in RECORDED[name].decode().split("\r\n") if line.startswith("{")]
    assert plain.body.decode() == "".join(lines)
    line, _, body = fake.requests.get(timeout=DEADLINE)
    assert line == f"POST {path} HTTP/1.1" and body == request
    framed = call(server, "POST", path, request, SSE)
    assert framed.events() == [line.rstrip("\n") for line in lines] + ["[DONE]"]


def test_native_refusal_passes_unchanged_even_where_frames_were_asked_for(start):
    server, _ = start(RECORDED["missing"])
    answer = call(server, "POST", "/api/chat", {}, SSE)
    assert (answer.status, answer.body) == (404, b'{"error":"model \'nosuch\' not found"}')


def test_native_error_line_is_the_last_frame(start):
    server, _ = start(RECORDED["die_mid_generate"])
    events = call(server, "POST", "/api/generate", {}, SSE).events()
    assert json.loads(events[-1]) == {
        "error": "an error was encountered while running the model: unexpected EOF"}


@pytest.mark.parametrize("size", [None, 1])
def test_native_answer_that_is_cut_stays_cut(start, size):
    server, _ = start(RECORDED["hello"][:900], size=size)
    assert call(server, "POST", "/api/chat", {}).cut
    assert_failed(call(server, "POST", "/api/chat", {}, SSE), code="upstream_cut")


def test_native_line_without_done_is_no_end(start):
    server, _ = start(SAID + b"0\r\n\r\n")
    assert_failed(call(server, "POST", "/api/chat", {}, SSE), code="upstream_cut")


# ---- The connection ----------------------------------------------------------------------------


def test_each_frame_arrives_before_the_next_record_is_said(start):
    more = threading.Event()
    server, _ = start(SAID, more, chunk(FINAL) + b"0\r\n\r\n")
    connection = connect(server)
    connection.request("POST", "/v1/chat/completions", json.dumps(
        {"model": "m", "messages": [], "stream": True}))
    response = connection.getresponse()
    frames = [response.readline() + response.readline() for _ in range(2)]
    assert b'"content":"some"' in frames[1] and frames[1].endswith(b"\n\n")
    more.set()
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()


def test_connection_is_kept_for_the_next_request_after_answers_and_streams(start):
    server, _ = start(RECORDED["hello"])
    connection = connect(server)
    for stream in True, False, True:
        connection.request("POST", "/v1/chat/completions", json.dumps(
            {"model": "m", "messages": [], "stream": stream}))
        used = connection.sock
        assert connection.getresponse().read()
        assert connection.sock is used and used is not None
    connection.request("POST", "/v1/chat/completions", b"{}")
    assert connection.getresponse().read() and connection.sock is used
    connection.close()


def test_client_that_hangs_up_in_the_stream_ends_the_upstream_request(start):
    gone = threading.Event()

    class Endless:
        """A step that speaks until the proxy hangs up."""
        def __len__(self):
            return 1 << 40

        def __getitem__(self, _):
            return chunk(says("more"))
    server, fake = start(HEAD, Endless(), size=1)
    serve = fake.serve
    fake.serve = lambda connection: (serve(connection), gone.set())
    connection = connect(server)
    connection.request("POST", "/v1/chat/completions", json.dumps(
        {"model": "m", "messages": [], "stream": True}))
    response = connection.getresponse()
    response.readline()
    response.close()
    connection.close()
    assert gone.wait(DEADLINE)


def raw(server, data):
    """Send bytes, read until the proxy closes or falls silent at its end."""
    with socket.create_connection(("127.0.0.1", server.server_port), DEADLINE) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_http_1_0_client_gets_an_unchunked_stream(start):
    server, _ = start(RECORDED["length"])
    body = b'{"model":"m","messages":[],"stream":true}'
    answer = raw(server, b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body), body))
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head and rest.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("request_bytes, status", [
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n", 411),
    (b"POST /v1/chat/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    (b"GET /v1/models HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}", 400),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n{}", 413),
    (b"POST /v1/nosuch HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 404),
    (b"DELETE /v1/models HTTP/1.1\r\n\r\n", 405),
    (b"BREW /v1/models HTTP/1.1\r\n\r\n", 501),
    (b"nonsense\r\n\r\n", 400),
])
def test_refused_request_gets_openais_error_and_the_connection_closes(start, request_bytes, status):
    server, _ = start()
    answer = raw(server, request_bytes + b"GET /v1/models HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    assert sorted(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]) == [
        "code", "message", "param", "type"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b'"x"', b"\xff", b'{"model":NaN}', b'{"model":"a","model":"b"}', b"[" * 100_000,
    b'{"a":' * 100_000, b'{"model":"m","messages":[],"seed":1e999}'])
def test_body_that_is_no_json_object_is_a_400(start, body):
    server, _ = start()
    answer = call(server, "POST", "/v1/chat/completions", body, {"Content-Length": str(len(body))})
    assert answer.status == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_wrong_paths_and_methods_get_a_hint(start):
    server, _ = start()
    answer = call(server, "POST", "/chat/completions", {})
    assert answer.status == 404
    assert f"base_url should be http://127.0.0.1:{server.server_port}/v1" in answer.json()["error"]["message"]
    answer = call(server, "GET", "/v1/chat/completions")
    assert answer.status == 405 and answer.headers["Allow"] == "POST"


def test_unknown_fields_cannot_break_the_header(start):
    server, _ = start(RECORDED["hello"])
    answer = chat(server, **{"a\r\nX-Evil: 1": 1, "ü\u2028": 2, "b" * 9999: 3, "none": None})
    ignored = answer.headers["X-Ignored-Fields"]
    assert ignored.startswith("a%0D%0AX-Evil%3A%201, %C3%BC%E2%80%A8, bbb") and len(ignored) < 200
    assert "X-Evil" not in answer.headers and "none" not in ignored
    answer = chat(server, **{f"f{i}": 1 for i in range(1000)})
    assert answer.headers["X-Ignored-Fields"].endswith("f19, and 980 more")


def test_models_are_listed_from_tags(start):
    server, _ = start(RECORDED["tags"])
    answer = call(server, "GET", "/v1/models").json()
    assert answer["object"] == "list"
    assert answer["data"][0] == {
        "id": "tool:latest", "object": "model", "created": 1795385881, "owned_by": "library",
        "context_length": 4096, "capabilities": ["completion", "tools"]}


@pytest.mark.parametrize("body", [b'{"models":null}', b'{"models":[]}', b"{}"])
def test_no_models_are_an_empty_list(start, body):
    server, _ = start(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert call(server, "GET", "/v1/models").json() == {"object": "list", "data": []}


def test_fault_of_the_proxy_itself_is_a_500_and_its_traceback_is_logged(start, monkeypatch, capfd):
    monkeypatch.setattr(proxy_module, "translate", lambda *_: 1 / 0)
    server, _ = start(RECORDED["hello"])
    answer = chat(server)
    assert answer.status == 500 and answer.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in capfd.readouterr().err


# ---- Demo --------------------------------------------------------------------------------------


def test_demo_lists_its_models_and_what_each_shows(demo):
    models = call(demo, "GET", "/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["demo-text", "demo-think", "demo-tool", "demo-error"]
    assert all(m["description"] for m in models)


def test_demo_models_show_what_they_say(demo):
    assert "你好" in chat(demo, model="demo-text").deltas()
    assert chat(demo, model="demo-think").deltas("reasoning")
    message = chat(demo, model="demo-tool", stream=False).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "get_weather"
    assert_failed(chat(demo, model="demo-error"), code="upstream_error")
    assert chat(demo, model="nosuch").status == 404


def test_demo_answers_a_tools_result_and_obeys_a_limit(demo):
    answer = chat(demo, model="demo-tool", messages=[{"role": "tool", "content": "sunny"}])
    assert answer.deltas() == "The tool said: sunny"
    choice = chat(demo, model="demo-text", stream=False, max_tokens=2).json()["choices"][0]
    assert choice["message"]["content"] == "Hello! Every" and choice["finish_reason"] == "length"


def test_demo_speaks_the_generate_format_too(demo):
    events = call(demo, "POST", "/api/generate", {"model": "demo-text"}, SSE).events()
    assert json.loads(events[0])["response"] == "Hello!" and events[-1] == "[DONE]"


# ---- Command line ------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*arguments, **environ):
    """The program as its own process: (process, the URL it says it listens on)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("NDJSON_", "OLLAMA_"))}
    process = subprocess.Popen([sys.executable, str(PROGRAM), *arguments], stderr=subprocess.PIPE,
                               universal_newlines=True, env={**clean, **environ})
    try:
        yield process
    finally:
        process.kill()
        process.wait(DEADLINE)
        process.stderr.close()


def test_program_says_where_it_listens_answers_and_ends_cleanly_on_sigterm():
    with running("--demo", "--listen", "127.0.0.1:0") as process:
        url = re.search(r"listens on http://127.0.0.1:(\d+)", process.stderr.readline())
        assert "demo" in process.stderr.readline()
        connection = http.client.HTTPConnection("127.0.0.1", int(url[1]), timeout=DEADLINE)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200
        connection.close()
        if os.name == "nt":
            return
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to the whole group")
def test_ctrl_c_ends_the_program_cleanly_in_a_stream():
    with running("--demo", "--listen", "127.0.0.1:0") as process:
        port = int(re.search(r":(\d+) ", process.stderr.readline())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        connection.request("POST", "/v1/chat/completions", json.dumps(
            {"model": "demo-text", "messages": [], "stream": True}))
        connection.getresponse().readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
        assert "Traceback" not in process.stderr.read()
        connection.close()


def test_program_warns_when_ollama_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with running("--listen", "127.0.0.1:0", OLLAMA_HOST=f"127.0.0.1:{port}") as process:
        lines = [process.stderr.readline() for _ in range(3)]
        assert f"sends to http://127.0.0.1:{port}" in lines[1]
        assert lines[2].startswith("warning: Ollama can't be reached") and "--demo" in lines[2]


@pytest.mark.parametrize("arguments, environ, text", [
    (["--listen", "127.0.0.1:99999"], {}, "--listen"),
    (["--listen", "no host"], {}, "no host"),
    (["--listen", "192.0.2.1:0"], {}, "can't listen"),
    (["--listen", "https://127.0.0.1:1"], {}, "HOST:PORT"),
    (["--upstream", "ftp://box"], {}, "--upstream"),
    (["--upstream", "http://user@box"], {}, "--upstream"),
    (["--upstream", "http://127.0.0.1:1x"], {}, "--upstream"),
    (["--upstream", "127.0.0.1:11435"], {}, "same address"),
    (["--idle-timeout", "0"], {}, "--idle-timeout"),
    (["--idle-timeout", "nan"], {}, "--idle-timeout"),
    (["--nosuch"], {}, "--nosuch"),
    ([], {"NDJSON_SSE_PROXY_IDLE_TIMEOUT": "soon"}, "--idle-timeout"),
    ([], {"NDJSON_SSE_PROXY_DEMO": "perhaps"}, "--demo"),
])
def test_mistake_on_the_command_line_is_one_line_and_status_2(arguments, environ, text):
    with running(*arguments, **environ) as process:
        output = process.stderr.read()
        assert process.wait(DEADLINE) == 2
    assert len(output.splitlines()) == 1 and text in output, output


def test_port_in_use_is_one_line_and_status_2():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with running("--demo", "--listen", f"127.0.0.1:{port}") as process:
            output = process.stderr.read()
            assert process.wait(DEADLINE) == 2
    assert len(output.splitlines()) == 1 and f"127.0.0.1:{port}" in output


def test_flag_wins_over_environment_and_environment_over_default():
    environ = {"NDJSON_SSE_PROXY_IDLE_TIMEOUT": "5", "OLLAMA_HOST": "0.0.0.0", "NDJSON_SSE_PROXY_DEMO": "1"}
    config = proxy_module.read_config(["--idle-timeout", "7"], environ)
    assert config.idle_timeout == 7 and config.demo is True
    assert config.upstream.geturl() == "http://0.0.0.0:11434"
    environ["NDJSON_SSE_PROXY_UPSTREAM"] = "box:1"
    assert proxy_module.read_config([], environ).upstream.geturl() == "http://box:1"
    assert proxy_module.read_config([], {}) == Config()


@pytest.mark.parametrize("text, url", [
    ("", "http://127.0.0.1:11434"), (":8080", "http://127.0.0.1:8080"), ("box", "http://box:11434"),
    ("http://box", "http://box:80"), ("HTTPS://Box/", "HTTPS://Box:443"), ("[::1]:5", "http://[::1]:5"),
    ("http://box:5/ollama/", "http://box:5/ollama")])
def test_upstream_is_read_as_ollama_reads_its_own_variable(text, url):
    assert parse_url(text).geturl().lower() == url.lower()


def test_help_lists_every_setting_and_fits_a_screen_and_a_half():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        proxy_module.read_config(["--help"], {})
    for name in Config._fields:
        assert "--" + name.replace("_", "-") in out.getvalue()
    assert len(out.getvalue().splitlines()) < 60
    assert tuple(proxy_module.FLAGS) == Config._fields


# ---- Documents ---------------------------------------------------------------------------------


def test_doctests_run():
    result = doctest.testmod(proxy_module)
    assert result.attempted > 15 and result.failed == 0


def test_readme_names_every_flag_and_no_other():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    flags = {"--" + name.replace("_", "-") for name in Config._fields} | {"--version", "--help"}
    table = readme[readme.index("## Command line"):]
    table = table[:table.index("\n## ")]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", table)) == flags
