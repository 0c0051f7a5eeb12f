"""Tests of ndjson_sse_proxy. They read as its specification: each name says situation and outcome.

FakeOllama plays exact bytes over a real socket; most of them were recorded from a real Ollama.
Nothing here sleeps: tests wait on events, or on a socket, with a deadline.
"""
from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import gc
import http.client
import inspect
import io
import json
import math
import os
import platform
import queue
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import doctest
import pytest

import ndjson_sse_proxy as proxy_module
from ndjson_sse_proxy import (
    ChatStream, ProxyError, ProxyServer, parse_url, read_settings, sse_event, start_demo,
    to_ollama_chat, translate, whole_answer)

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
    "logprobs": stream("Sun, 22 Nov 2026 22:19:43 GMT", r'''
{"model":"hello","created_at":"2026-11-22T22:19:43.080460383Z","message":{"role":"assistant","content":"Hello"},"done":false,"logprobs":[{"token":"Hello","logprob":0,"bytes":[72,101,108,108,111],"top_logprobs":[{"token":"Hello","logprob":0,"bytes":[72,101,108,108,111]},{"token":"!","logprob":-67.875,"bytes":[33]}]}]}
{"model":"hello","created_at":"2026-11-22T22:19:43.082748508Z","message":{"role":"assistant","content":" from"},"done":false,"logprobs":[{"token":" from","logprob":0,"bytes":[32,102,114,111,109],"top_logprobs":[{"token":" from","logprob":0,"bytes":[32,102,114,111,109]},{"token":"!","logprob":-67.875,"bytes":[33]}]}]}
{"model":"hello","created_at":"2026-11-22T22:19:43.087361672Z","message":{"role":"assistant","content":" a"},"done":false,"logprobs":[{"token":" a","logprob":0,"bytes":[32,97],"top_logprobs":[{"token":" a","logprob":0,"bytes":[32,97]},{"token":"!","logprob":-67.875,"bytes":[33]}]}]}
{"model":"hello","created_at":"2026-11-22T22:19:43.088444067Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"length","total_duration":18411285,"load_duration":1067594,"prompt_eval_count":9,"prompt_eval_duration":3899000,"eval_count":3,"eval_duration":9193000}
'''),
    "format_schema": stream("Sun, 22 Nov 2026 22:21:56 GMT", r'''
{"model":"hello","created_at":"2026-11-22T22:21:56.772399415Z","message":{"role":"assistant","content":"{\""},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:56.808573907Z","message":{"role":"assistant","content":"o"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:56.892004737Z","message":{"role":"assistant","content":"k"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:56.911128204Z","message":{"role":"assistant","content":"\":\n"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:56.944331062Z","message":{"role":"assistant","content":"\n"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:56.968960625Z","message":{"role":"assistant","content":" f"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:56.987989532Z","message":{"role":"assistant","content":"alse"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.006630278Z","message":{"role":"assistant","content":",\n"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.028836286Z","message":{"role":"assistant","content":"                    "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.048022767Z","message":{"role":"assistant","content":"\""},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.067006265Z","message":{"role":"assistant","content":"n"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.085484229Z","message":{"role":"assistant","content":"\":\n"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.11243029Z","message":{"role":"assistant","content":"          "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.130767283Z","message":{"role":"assistant","content":"\t\t\t\t\t\t\t"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.15007115Z","message":{"role":"assistant","content":" \t"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.171083796Z","message":{"role":"assistant","content":" "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.190349105Z","message":{"role":"assistant","content":"\""},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.210077114Z","message":{"role":"assistant","content":"b"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.232597621Z","message":{"role":"assistant","content":"lu"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.247793116Z","message":{"role":"assistant","content":"e"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.266306403Z","message":{"role":"assistant","content":"\"\n\n"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.287478467Z","message":{"role":"assistant","content":"\t\t "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.310695203Z","message":{"role":"assistant","content":" \t"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.332429566Z","message":{"role":"assistant","content":"         "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.354475174Z","message":{"role":"assistant","content":"\t\t\t  "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.375444455Z","message":{"role":"assistant","content":" "},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.389470136Z","message":{"role":"assistant","content":"}"},"done":false}
{"model":"hello","created_at":"2026-11-22T22:21:57.403279222Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":766590203,"load_duration":2319922,"prompt_eval_count":9,"prompt_eval_duration":127036000,"eval_count":28,"eval_duration":634571000}
'''),
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
    "format_anyof": whole("200 OK", "application/json; charset=utf-8", "Sun, 22 Nov 2026 22:21:58 GMT", r'''{"model":"hello","created_at":"2026-11-22T22:21:57.999908199Z","message":{"role":"assistant","content":"{\n\n    \"name\":\"a\",\n               \t  \t \"arguments\":{\n\t\t\t    \t\t\t\t\t\t\t\t\t\t\t\t\t\"x\":false\n\n\t\t\t\t\t\t\t\t \t\t\t\t   \t\t\t }\n\n\t\t   \t\t\t\t\t\t\t\t\t\t\t }"},"done":true,"done_reason":"stop","total_duration":595569145,"load_duration":978280,"prompt_eval_count":9,"prompt_eval_duration":13916000,"eval_count":40,"eval_duration":575855000}''', chunked=False),
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
HOLD = object()  # a step: do nothing until the proxy hangs up; then `left` is set


class Endless:
    """A step, for size=1, that says the same until the proxy hangs up."""

    def __init__(self, piece):
        self.piece, self.sent = piece, 0

    def __len__(self):
        return 1 << 40

    def __getitem__(self, _):
        self.sent += len(self.piece)
        return self.piece


def reset_on_close(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class FakeOllama:
    """Plays `steps` on each connection: bytes are sent, events are waited for, RESET resets.

    At the end it sends FIN and waits until the proxy has hung up, which sets `hung_up`.
    """

    def __init__(self, *steps, size=None, answers=()):
        self.steps, self.size = steps, size  # size: send pieces of so many bytes
        self.answers = list(answers)  # steps for the first connections, in their order
        self.requests = queue.Queue()  # (request line, headers, body)
        self.hung_up, self.left = threading.Event(), threading.Event()
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
            if not line:
                return reader.close()
            headers = http.client.HTTPMessage()
            for header in iter(reader.readline, b"\r\n"):
                name, _, value = header.decode("latin-1").partition(":")
                headers[name] = value.strip()
            self.requests.put((line, headers, reader.read(int(headers.get("Content-Length", 0)))))
            for step in self.answers.pop(0) if self.answers else self.steps:
                if step is RESET:
                    reset_on_close(connection)
                    reader.close()
                    return
                if step is HOLD:
                    if not connection.recv(1):
                        self.left.set()
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


def make_settings(upstream, **changes):
    """The default settings with changes by name, on a free port."""
    settings = read_settings(["--listen", "127.0.0.1:0", "--upstream", upstream], {})
    assert set(changes) <= set(vars(settings))
    vars(settings).update(changes)
    return settings


@pytest.fixture
def start(request):
    """start(*steps) -> (proxy, fake upstream); settings by name go to Config."""
    def start(*steps, size=None, answers=(), upstream=None, **settings):
        fake = None if upstream else FakeOllama(*steps, size=size, answers=answers)
        server = ProxyServer(make_settings(upstream or fake.url, **settings))
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
    proxy_module.DemoHandler.pace = 0
    server = ProxyServer(make_settings(start_demo()))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """A queue of what the proxy says on stderr; and a watchdog that looks often."""
    lines = queue.Queue()
    monkeypatch.setattr(proxy_module, "say", lines.put)
    monkeypatch.setattr(proxy_module, "TICK_SECONDS", 0.02)
    return lines


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

    def text(self):
        """What a client would show, streamed or whole."""
        if "event-stream" in self.headers["Content-Type"]:
            assert self.events()[-1] == "[DONE]" and not self.cut
            return self.deltas()
        return self.json()["choices"][0]["message"]["content"]

    def chunks(self):
        return [json.loads(data) for data in self.events() if data != "[DONE]"]

    def folded(self):
        """The choices of the whole answer that the stream adds up to."""
        stream = ChatStream("m", "x", 0)
        choices = (c for chunk in self.chunks() for c in chunk["choices"])
        return whole_answer(stream, choices)["choices"]

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


def parsed(data):
    return [record for _, record in proxy_module.records(io.BytesIO(data))]


def test_ndjson_with_blank_lines_and_crlf_gives_its_records():
    data = '{"a":"你好 🙂"}\r\n\n  {"b":2}\n{"c":[3]}\n'.encode()
    assert parsed(data) == [{"a": "你好 🙂"}, {"b": 2}, {"c": [3]}]


def test_ndjson_last_line_without_newline_is_a_record():
    assert parsed(b'{"a":1}') == [{"a": 1}]


def test_ndjson_end_inside_a_line_raises():
    with pytest.raises(ProxyError, match="ended inside a line") as error:
        parsed(b'{"a":1}\n{"a":')
    assert error.value.code == "upstream_cut"


@pytest.mark.parametrize("line", [
    b"[1]", b"1", b"null", b"7e", b"{", b"{'a':1}", b'{"a":NaN}', b'{"a":1e999}', b'{"a":"\xff"}',
    b'{"a":1}{"b":2}', b"\xef\xbb\xbf{}", b"<html>", b'{"a":' + b"[" * 100_000])
def test_ndjson_line_that_is_no_object_raises_after_the_good_ones(line):
    found = proxy_module.records([b'{"good":1}\n', line + b"\n"])
    assert next(found)[1] == {"good": 1}
    with pytest.raises(ProxyError) as error:
        next(found)
    assert (error.value.status, error.value.code) == (502, "upstream_protocol")


@pytest.mark.parametrize("number, good", [
    ("1" * 308, True), ("-" + "1" * 308, True), ("1" * 310, False), ("-" + "9" * 5000, False)])
def test_ndjson_integer_that_could_not_be_written_again_is_refused(number, good):
    line = b'{"a":%b}\n' % number.encode()
    if good:
        assert parsed(line) == [{"a": int(number)}]
    else:
        with pytest.raises(ProxyError):
            parsed(line)


def test_ndjson_line_without_end_is_refused_at_the_cap(monkeypatch):
    monkeypatch.setattr(proxy_module, "MAX_LINE_BYTES", 100)
    with pytest.raises(ProxyError, match="longer than 100 bytes"):
        parsed(b"x" * 101)


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


def function(name="f", **parameters):
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": parameters}}}


def named(name):
    return {"type": "function", "function": {"name": name}}


def forced_format(**schemas):
    """The `format` that forces a call of one of these functions; the schemas have no references."""
    calls = [{"type": "object", "required": ["name", "arguments"], "properties": {
        "name": {"const": name}, "arguments": {"$ref": f"#/$defs/{i}"}}} for i, name in enumerate(schemas)]
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}),
            "$defs": {str(i): schema for i, schema in enumerate(schemas.values())}}


ABSENT, NAMED_400, HINT = "absent", "a 400 that names the field", "no effect and no complaint"
SCHEMA = {"type": "object", "$defs": {"x": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/x"}}}
# field, what is sent, where it shows in the native request, and as what
CHAT_CASES = [
    ("model", {"model": "other"}, "body.model", "other"),
    ("messages", {"messages": [{"role": "user", "content": "x"}]}, "body.messages",
     [{"role": "user", "content": "x"}]),
    ("stream", {"stream": True}, "wanted.stream", True),
    ("stream_options", {"stream_options": {"include_usage": True}}, "wanted.usage", True),
    ("max_tokens", {"max_tokens": 5}, "body.options.num_predict", 5),
    ("max_tokens", {"max_tokens": 5, "options": {"num_predict": 9}}, "body.options.num_predict", 5),
    ("max_completion_tokens", {"max_completion_tokens": 6, "max_tokens": 5},
     "body.options.num_predict", 6),
    ("temperature", {"temperature": 0, "options": {"temperature": 1}}, "body.options.temperature", 0),
    ("stop", {"stop": "x"}, "body.options.stop", ["x"]),
    ("stop", {"stop": ["x", "y"]}, "body.options.stop", ["x", "y"]),
    *[(name, {name: value}, f"body.options.{name}", value) for name, value in [
        ("top_p", 0.5), ("seed", 7), ("presence_penalty", -1), ("frequency_penalty", 1.5),
        ("num_ctx", 4096), ("num_predict", 3), ("num_keep", 4), ("num_batch", 8), ("num_gpu", 0),
        ("main_gpu", 1), ("num_thread", 2), ("repeat_last_n", 64), ("top_k", 40), ("min_p", 0.1),
        ("typical_p", 0.9), ("repeat_penalty", 1.1), ("use_mmap", False)]],
    ("options", {"options": {"num_ctx": 2048, "future": 1}}, "body.options",
     {"num_ctx": 2048, "future": 1}),
    ("num_ctx", {"num_ctx": 1, "options": {"num_ctx": 2}}, "body.options.num_ctx", 1),
    ("keep_alive", {"keep_alive": "5m"}, "body.keep_alive", "5m"),
    ("think", {"think": "high"}, "body.think", "high"),
    ("format", {"format": "json"}, "body.format", "json"),
    ("truncate", {"truncate": True}, "body.truncate", True),
    ("shift", {"shift": False}, "body.shift", False),
    ("n", {"n": 1}, HINT, None),
    ("logprobs", {"logprobs": True}, "body.logprobs", True),
    ("top_logprobs", {"top_logprobs": 2}, "body.top_logprobs", 2),
    *[("reasoning_effort", {"reasoning_effort": effort, "think": True}, "body.think", think)
      for effort, think in [("none", False), ("minimal", "low"), ("low", "low"),
                            ("medium", "medium"), ("high", "high"), ("xhigh", "max"), ("max", "max")]],
    ("reasoning", {"reasoning": {"effort": "high"}}, "body.think", "high"),
    ("reasoning", {"reasoning": {"summary": "auto"}}, "body.think", ABSENT),
    ("response_format", {"response_format": {"type": "text"}, "format": "json"}, "body.format", ""),
    ("response_format", {"response_format": {"type": "json_object"}}, "body.format", "json"),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "schema": SCHEMA}}}, "body.format", SCHEMA),
    ("tools", {"tools": [function()]}, "body.tools", [function()]),
    ("tool_choice", {"tools": [function()], "tool_choice": "none"}, "body.tools", ABSENT),
    ("tool_choice", {"tools": [function()], "tool_choice": "auto"}, "body.tools", [function()]),
    ("tool_choice", {"tools": [function()], "tool_choice": "required"}, "wanted.forced", True),
    ("tool_choice", {"tools": [function("f"), function("g", a={})], "tool_choice": named("g")},
     "body.format", forced_format(g=function(a={})["function"]["parameters"])),
    ("tool_choice", {"tools": [function("f"), function("g")], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("g")]}}},
     "body.tools", [function("g")]),
    ("tool_choice", {"tools": [function("f"), function("g")], "tool_choice": {
        "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("g")]}}},
     "body.format", forced_format(g=function()["function"]["parameters"])),
    ("tool_choice", {"tools": [function("f")], "tool_choice": named("g")}, NAMED_400, None),
    ("tool_choice", {"tool_choice": "required"}, NAMED_400, None),
    ("tool_choice", {"tools": [function("f")], "tool_choice": "always"}, NAMED_400, None),
    ("parallel_tool_calls", {"parallel_tool_calls": False}, "wanted.max_calls", 1),
    ("parallel_tool_calls", {"parallel_tool_calls": True}, "wanted.max_calls", ABSENT),
    ("stream_options", {"stream_options": {"include_usage": None}}, "wanted.usage", ABSENT),
    ("tool_choice", {"tools": [function("f")], "tool_choice": "none"}, "wanted.max_calls", 0),
    *[(name, {name: value}, HINT, None) for name, value in [
        ("user", "u"), ("metadata", {"a": "b"}), ("safety_identifier", "s"), ("prompt_cache_key", "k"),
        ("prompt_cache_options", {}), ("prompt_cache_retention", "24h"),
        ("prediction", {"type": "content", "content": "x"}), ("verbosity", "low"),
        ("service_tier", "auto"), ("store", False), ("logit_bias", {}), ("function_call", None),
        ("functions", []), ("modalities", ["text"])]],
    *[(name, {name: value}, NAMED_400, None) for name, value in [
        ("store", True), ("logit_bias", {"50256": -100}), ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]), ("moderation", {"a": 1}), ("web_search_options", {"a": 1}),
        ("functions", [{"name": "f"}]), ("function_call", "auto"), ("n", 2), ("n", "2")]],
]


def check_case(request, field, sent, place, expected):
    """`request()` translates `sent`; look at what became of it."""
    if place == NAMED_400:
        with pytest.raises(ProxyError) as error:
            request(sent)
        assert (error.value.status, error.value.param) == (400, field)
        assert field in error.value.message
        return
    result = request(sent)
    assert result.ignored == []
    if place == HINT:
        assert result == request({})
        return
    found = result._asdict()
    for step in place.split("."):
        found = found.get(step, ABSENT)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("field, sent, place, expected", CHAT_CASES)
def test_field_of_a_chat_does_what_its_row_says(field, sent, place, expected):
    check_case(lambda sent: to_ollama_chat({"model": "m", "messages": [], **sent}),
               field, sent, place, expected)


def test_every_row_of_the_tables_has_a_case():
    assert {case[0] for case in CHAT_CASES} == set(proxy_module.CHAT_FIELDS)


def test_one_of_several_functions_is_forced_by_an_any_of_whose_references_still_hold():
    tools = [{"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/T"}}, "$defs": {"T": {"type": kind}}}}}
        for name, kind in [("f", "string"), ("g", "integer")]]
    request = to_ollama_chat({"model": "m", "messages": [{"role": "user", "content": "x"}],
                              "tools": tools, "tool_choice": "required"})
    assert request.body["format"] == {
        "anyOf": [{"type": "object", "required": ["name", "arguments"], "properties": {
            "name": {"const": name}, "arguments": {"$ref": f"#/$defs/{i}"}}}
            for i, name in enumerate("fg")],
        "$defs": {str(i): {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{i}/$defs/T"}},
                           "$defs": {"T": {"type": kind}}}
                  for i, kind in enumerate(["string", "integer"])}}
    assert "tools" not in request.body and request.wanted["forced"]
    assert [m["role"] for m in request.body["messages"]] == ["user", "system"]
    assert '"name":"g"' in request.body["messages"][1]["content"]


def test_fields_not_sent_or_null_stay_out_so_that_the_modelfile_holds():
    body = native(temperature=None, stop=None, tools=None, response_format={"type": "text"})
    assert body["options"] == {}
    assert body["format"] == "" and "tools" not in body and "think" not in body


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
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "file"}]}]),
    ("messages[0].content[0].image_url", [{"role": "user", "content": [{"type": "image_url"}]}]),
    *[("messages[0].content[0].image_url", [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}]}]) for url in [
            "https://example.com/x.png", "data:image/png;base64,!!!!", "data:image/svg+xml;base64,AAAA",
            "data:image/png,AAAA", "file:///etc/passwd"]],
    ("messages[0].content[0].type", [{"role": "user", "content": [
        {"type": "input_audio", "input_audio": {"data": "AAAA"}}]}]),
    ("messages[0].function_call", [{"role": "assistant", "function_call": {"name": "f"}}]),
    ("messages[0].role", [{"role": "function", "name": "f", "content": "x"}]),
    ("messages[0].tool_calls[0].id", [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "{}"}}]}]),
    *[("tools[0].function.parameters", [{"type": "function", "function": {
        "name": "f", "parameters": value}}]) for value in ["x", False, None, []]],
    ("options.seed", {"seed": "x"}), ("options.num_ctx", {"num_ctx": "big"}),
    ("messages[0].tool_calls[0].function.arguments", [{"role": "assistant", "tool_calls": [
        {"id": "c", "function": {"name": "f", "arguments": []}}]}]),
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
    request = to_ollama_chat({"model": "m", "messages": messages})
    assert request.ignored == []
    assert request.body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [
            {"id": f"c{i}", "function": {"index": i, "name": f"f{i}",
                                         "arguments": {"city": "Paris"} if i == 0 else {}}}
            for i in range(4)]},
        {"role": "tool", "tool_call_id": "c1", "tool_name": "f1", "content": "sunny"},
    ]


def test_parts_of_a_message_become_one_message_with_its_images():
    png = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    parts = [{"type": "text", "text": "What is "},
             {"type": "image_url", "image_url": {"url": "data:image/png;base64," + png, "detail": "low"}},
             {"type": "image_url", "image_url": "data:image/jpeg;base64,AAAA"},
             {"type": "text", "text": "this?"}]
    assert native(messages=[{"role": "user", "content": parts}])["messages"] == [
        {"role": "user", "content": "What is this?", "images": [png, "AAAA"]}]


def test_unknown_members_of_messages_are_named():
    request = to_ollama_chat({"model": "m", "messages": [{"role": "user", "content": "x", "mood": 1}]})
    assert request.ignored == ["messages[0].mood"]


# ---- 6. Stream ---------------------------------------------------------------------------------


def new_stream(**reply):
    return ChatStream("m", "chatcmpl-x", 1700000000, reply)


def test_tool_calls_are_counted_over_the_whole_stream_and_get_unique_ids():
    def calls(*ids):
        return {"message": {"content": "", "tool_calls": [
            {**({"id": i} if i else {}), "function": {"index": 0, "name": "f", "arguments": {"a": 1}}}
            for i in ids]}}
    s = new_stream()
    choices = [c for r in [calls("a", ""), calls("a", "b"), {"done": True}] for c in s.feed(r)]
    sent = [c["delta"]["tool_calls"][0] for c in choices
            if "tool_calls" in c["delta"]]
    assert [call["index"] for call in sent] == [0, 1, 2, 3]
    ids = [call["id"] for call in sent]
    assert len(set(ids)) == 4 and ids[0] == "a" and ids[3] == "b" and all(ids)
    assert all(len(i) <= 40 for i in ids)  # OpenAI's limit, when they come back
    assert sent[0]["function"] == {"name": "f", "arguments": '{"a":1}'}
    assert choices[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("reason, calls, expected", [
    ("stop", False, "stop"), ("length", False, "length"), (None, False, "stop"), ("load", False, "stop"),
    ("unload", False, "stop"), ("stop", True, "tool_calls"), ("length", True, "length")])
def test_finish_reason_is_one_that_openai_knows(reason, calls, expected):
    message = {"content": "x"}
    if calls:
        message["tool_calls"] = [{"function": {"name": "f", "arguments": {}}}]
    s = new_stream()
    choices = list(s.feed({"message": message, "done": True, "done_reason": reason}))
    assert [c["finish_reason"] for c in choices][-1] == expected
    assert sum(c["finish_reason"] is not None for c in choices) == 1


def test_record_with_thinking_content_and_call_becomes_one_delta_each():
    s = new_stream()
    choices = s.feed({"message": {"thinking": "t", "content": "c", "tool_calls": [
        {"id": "i", "function": {"name": "f", "arguments": {}}}]}})
    assert [sorted(c["delta"]) for c in choices] == [
        ["content", "role"], ["reasoning", "reasoning_content"], ["content"], ["tool_calls"]]


@pytest.mark.parametrize("record", [
    {}, {"message": None}, {"message": "x"}, {"message": {"content": 1}}, {"message": {"thinking": []}},
    {"message": {"tool_calls": {}}}, {"message": {"tool_calls": [1]}},
    {"message": {"tool_calls": [{"id": 1, "function": {"name": "f"}}]}},
    {"message": {"tool_calls": [{"function": {}}]}}, {"message": {"tool_calls": [{}]}},
    {"message": {}, "done": True, "eval_count": "9"}, {"message": {}, "done": "false"},
    {"message": {"content": "x"}, "done": 1}, {"message": {"content": "x"}, "logprobs": [5]},
    {"message": {"content": "x"}, "logprobs": "x"},
    {"message": {"tool_calls": [{"function": {"name": "f", "arguments": 5}}]}},
    {"message": {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}}])
def test_record_of_the_wrong_shape_is_a_breach_of_protocol(record):
    s = new_stream()
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


def test_usage_of_a_cached_prompt_counts_as_zero():
    s = new_stream()
    list(s.feed({"message": {}, "done": True, "eval_count": 3}))
    chunk = s.with_usage([])
    assert chunk["usage"] == {"prompt_tokens": 0, "completion_tokens": 3, "total_tokens": 3}
    assert chunk["choices"] == []


def whole(choices):
    """The choice that a stream's choices add up to."""
    return whole_answer(ChatStream("m", "x", 0), choices)["choices"][0]


def forced_stream(text, reason="stop"):
    s = new_stream(forced=True)
    answer = [{"message": {"content": text[:5]}}, {"message": {"content": text[5:]}},
               {"message": {}, "done": True, "done_reason": reason}]
    return whole(c for r in answer for c in s.feed(r))


@pytest.mark.parametrize("text, name, arguments", [
    ('{"name": "g", "arguments": {"b": [2]}}', "g", '{"b":[2]}'), ('{"name": "g"}', "g", "{}")])
def test_forced_call_is_the_whole_content_as_one_call(text, name, arguments):
    choice = forced_stream(text)
    call = choice["message"]["tool_calls"][0]
    assert call["function"] == {"name": name, "arguments": arguments} and call["type"] == "function"
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"


def test_forced_call_that_is_cut_says_length_and_gives_what_came():
    for reason in "length", "stop":
        choice = forced_stream('{"name": "g", "arguments": {"b": [', reason)
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"b": ['}


def test_forced_call_that_is_cut_before_its_name_stays_text():
    choice = forced_stream('{"name": "ge', "length")
    assert choice["message"] == {"role": "assistant", "content": '{"name": "ge'}
    assert choice["finish_reason"] == "length"


def test_second_call_is_dropped_where_the_client_wants_one_at_a_time():
    s = new_stream(max_calls=1)
    call = {"function": {"name": "f", "arguments": {}}}
    choices = s.feed({"message": {"tool_calls": [call, call]}}) + s.feed(
        {"message": {"tool_calls": [call]}, "done": True})
    assert len(whole(choices)["message"]["tool_calls"]) == 1


def test_middle_of_the_program_runs_on_bytes_alone():
    choices = translate([says("Hel"), says("lo"), FINAL], new_stream())
    assert whole(choices)["message"] == {"role": "assistant", "content": "Hello"}


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


def test_recorded_logprobs_get_openais_form(start):
    server, fake = start(RECORDED["logprobs"])
    for answer in chat(server, logprobs=True, top_logprobs=2), chat(server, stream=False, logprobs=True):
        if answer.headers["Content-Type"].startswith("text/event-stream"):
            choices = [c["choices"][0] for c in answer.chunks() if c["choices"][0].get("logprobs")]
            content = [token for choice in choices for token in choice["logprobs"]["content"]]
        else:
            logprobs = answer.json()["choices"][0]["logprobs"]
            assert logprobs["refusal"] is None
            content = logprobs["content"]
        assert [token["token"] for token in content] == ["Hello", " from", " a"]
        assert content[0] == {
            "token": "Hello", "logprob": 0, "bytes": [72, 101, 108, 108, 111], "top_logprobs": [
                {"token": "Hello", "logprob": 0, "bytes": [72, 101, 108, 108, 111]},
                {"token": "!", "logprob": -67.875, "bytes": [33]}]}


def test_logprobs_without_alternatives_still_have_the_list():
    s = new_stream()
    choices = s.feed({"message": {"content": ""}, "logprobs": [{"token": "a", "logprob": -1}]})
    assert choices[-1]["logprobs"]["content"] == [
        {"token": "a", "logprob": -1, "bytes": None, "top_logprobs": []}]


@pytest.mark.parametrize("stream", [True, False])
def test_effort_on_a_model_that_cannot_think_is_asked_again_without_it(start, stream):
    server, fake = start(answers=[[RECORDED["think_on_hello"]], [RECORDED["hello"]]])
    answer = chat(server, stream, reasoning_effort="high")
    assert answer.status == 200 and answer.headers["X-Ignored-Fields"] == "reasoning_effort"
    bodies = [json.loads(fake.requests.get(timeout=DEADLINE)[2]) for _ in range(2)]
    assert bodies[0]["think"] == "high" and "think" not in bodies[1]
    server, fake = start(RECORDED["think_on_hello"])
    assert chat(server, stream, think=True).status == 400  # asked for outright: refused outright
    server, fake = start(RECORDED["missing"])  # another refusal: not asked again
    answer = chat(server, stream, reasoning_effort="high")
    assert answer.status == 404 and fake.requests.qsize() == 1


def test_recorded_json_of_a_schema_streams_as_text(start):
    server, _ = start(RECORDED["format_schema"])
    assert json.loads(chat(server).deltas()) == {"ok": False, "n": "blue"}


def test_recorded_any_of_becomes_a_forced_call(start):
    server, _ = start(RECORDED["format_anyof"])
    answer = chat(server, tools=[function("a"), function("b")], tool_choice="required")
    choice = answer.folded()[0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "a", "arguments": '{"x":false}'}
    assert choice["finish_reason"] == "tool_calls"


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
    ("images", 400, "upstream_error", None, "Multimodal data provided, but model does not support"),
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
    assert "9009" in message and "--allow-truncation" in message
    assert "options.num_ctx" in message and "--option num_ctx" in message


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
    ((b"HTTP/1.1 103 Early Hints\r\n\r\n",), "upstream_protocol"),
    ((HEAD.replace(b"chunked", b"gzip, chunked") + chunk(says("some") + FINAL) + b"0\r\n\r\n",), None),
    ((SAID + chunk(FINAL.replace(b"true", b'"false"')) + b"0\r\n\r\n",), "upstream_protocol"),
])
def test_upstream_that_is_cut_or_garbled_never_looks_finished(start, stream, steps, code):
    server, _ = start(*steps)
    assert_failed(chat(server, stream=stream), 502, code)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ending", [(), (RESET,)])
def test_recording_cut_after_every_single_byte_never_looks_finished(start, ending, stream):
    recording = RECORDED["length"]
    end = recording.index(b"\n", recording.index(b'"done":true')) + 1
    server, fake = start()
    for i in range(end):
        fake.steps = (recording[:i], *ending)
        assert_failed(chat(server, stream=stream), 502)
    for i in range(end, len(recording)):
        fake.steps = (recording[:i],)  # by RST the line itself may be lost
        assert "Hello from a" in chat(server, stream=stream).text()


def mutated(rng, data):
    """The same bytes with a few changes: some replaced, left out, put in, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at, size = rng.randrange(len(data)), rng.choice([1, 1, 1, 5, 40])
        new = rng.choice([b"", b"\r\n", b"\n", b"0", b"\xff", b'"', b"{", b"\0", b"-1", b"1" * 30])
        data[at:at + rng.choice([0, size])] = new
    return bytes(data[:rng.randrange(len(data))] if rng.random() < 0.3 else data)


@pytest.mark.parametrize("name", ["hello", "length", "tool", "die_mid", "missing", "hello_whole"])
def test_random_upstream_answer_ends_well_or_says_an_error(start, log, name):
    rng, (server, fake) = random.Random(name), start(idle_timeout=0.2)
    for i in range(60):
        fake.steps = (mutated(rng, RECORDED[name]), *rng.choice([(), (RESET,)]))
        answer = chat(server, stream=i % 2 == 0)
        if answer.status != 200 or b'{"error":' in answer.body:
            assert_failed(answer, answer.status)
        elif i % 2 == 0:
            assert answer.events()[-1] == "[DONE]" and not answer.cut
            assert sum(c["choices"][0]["finish_reason"] is not None for c in answer.chunks()) == 1
        else:
            assert answer.json()["choices"][0]["finish_reason"]
    fake.steps = (RECORDED["hello"],)
    assert chat(server).deltas() == HELLO
    assert "Traceback" not in "".join(log.queue), "\n".join(log.queue)[-3000:]


def test_random_request_is_answered_or_closed_and_the_next_one_is_served(start, log):
    rng, (server, _) = random.Random(1), start(RECORDED["length"])
    body = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"top_p":1}'
    request = POST + HOST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    for _ in range(300):
        answer = raw(server, mutated(rng, request))
        assert not answer or answer.startswith(b"HTTP/1.1 ")
    assert "Hello from a" in chat(server).text()
    assert "Traceback" not in "".join(log.queue), "\n".join(log.queue)[-3000:]


def test_silent_upstream_is_a_504_or_an_error_frame(start):
    never = threading.Event()
    server, fake = start(never, idle_timeout=0.1)
    assert_failed(chat(server), 504, "upstream_timeout")
    fake.steps = (SAID, never)
    answer = chat(server)
    assert answer.status == 200
    assert_failed(answer, code="upstream_timeout")
    never.set()


def test_upstream_that_is_not_there_is_a_502_whose_address_only_the_log_has(start, log):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server, _ = start(upstream=f"http://127.0.0.1:{port}")
    error = assert_failed(chat(server), 502, "upstream_unreachable")
    assert "ollama serve" in error["message"] and str(port) not in error["message"]
    assert f"detail=\"http://127.0.0.1:{port}: " in log.get(timeout=DEADLINE)


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


def test_native_done_that_is_no_boolean_is_no_end(start):
    server, _ = start(HEAD + chunk(FINAL.replace(b"true", b'"no"')) + b"0\r\n\r\n")
    assert_failed(call(server, "POST", "/api/chat", {}, SSE), code="upstream_protocol")


def test_native_status_below_200_is_no_answer(start):
    server, _ = start(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    assert_failed(call(server, "POST", "/api/chat", {}), 502, "upstream_protocol")


def test_refusal_that_comes_before_the_whole_upload_is_passed_on(start):
    refusal = b'{"error":"too large for Ollama"}'
    server, fake = start()

    def refuse(connection):
        with connection:
            connection.recv(10)
            connection.sendall(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%b" % (
                len(refusal), refusal))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):
                pass
    fake.serve = refuse
    answer = chat(server, messages=[{"role": "user", "content": "x" * (8 << 20)}])
    assert answer.status == 400 and answer.json()["error"]["message"] == "too large for Ollama"


def test_native_line_without_done_is_no_end(start):
    server, _ = start(SAID + b"0\r\n\r\n")
    assert_failed(call(server, "POST", "/api/chat", {}, SSE), code="upstream_cut")


def test_routes_that_need_no_done_end_with_their_body(start):
    server, _ = start(RECORDED["version"])
    assert call(server, "GET", "/api/version", headers=SSE).events() == ['{"version":"0.0.0"}', "[DONE]"]


# ---- Other routes ------------------------------------------------------------------------------

PASSED = [("POST", path) for path in (
    "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions", "/api/chat",
    "/api/generate", "/api/embed", "/api/embeddings", "/api/show")] + [
    ("GET", path) for path in ("/api/tags", "/api/ps", "/api/version", "/api/status")]


@pytest.mark.parametrize("method, path", PASSED)
def test_passed_route_gives_and_takes_bytes_unread(start, method, path):
    body = b'\x00 not json, \xff' if method == "POST" else None
    answer_bytes = b'{"spacing":   "kept", "bad utf-8": "\xff"}'
    server, fake = start(b"HTTP/1.1 201 x\r\nContent-Type: a/b\r\nContent-Length: %d\r\n\r\n%b" % (
        len(answer_bytes), answer_bytes))
    answer = call(server, method, path + "?beta=true", body, {
        "Content-Type": "multipart/form-data; boundary=x", "anthropic-version": "1"})
    assert (answer.status, answer.headers["Content-Type"]) == (201, "a/b")
    assert answer.body == answer_bytes and answer.headers["Content-Length"] == str(len(answer_bytes))
    line, headers, sent = fake.requests.get(timeout=DEADLINE)
    assert line == f"{method} {path}?beta=true HTTP/1.1" and sent == (body or b"")
    assert headers["Content-Type"] == "multipart/form-data; boundary=x"
    assert headers["anthropic-version"] == "1"


@pytest.mark.parametrize("method, path", PASSED)
def test_passed_route_that_is_cut_stays_cut(start, method, path):
    for head in HEAD, b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n":
        server, _ = start(head + (chunk(b"{") if head is HEAD else b"{"))
        assert call(server, method, path, b"" if method == "POST" else None,
                    {"Content-Length": "0"} if method == "POST" else {}).cut


@pytest.mark.parametrize("method, path", [
    ("POST", "/api/pull"), ("POST", "/api/push"), ("POST", "/api/create"), ("POST", "/api/copy"),
    ("POST", "/api/me"), ("POST", "/api/signout"), ("POST", "/api/experimental/x"),
    ("DELETE", "/api/delete"), ("POST", "/api/blobs/sha256:0"), ("HEAD", "/api/blobs/sha256:0")])
def test_route_that_changes_ollama_is_a_403_and_not_forwarded(start, method, path):
    server, fake = start()
    answer = call(server, method, path)
    assert answer.status == 403 and fake.requests.empty()
    if method != "HEAD":
        assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize("method, path, hint", [
    ("GET", "/api/nosuch", ""), ("GET", "/api/tags/", "slash"), ("POST", "/v1/images/generations", ""),
    ("GET", "/metrics/x", ""), ("POST", "/chat/completions", "base_url should be"),
    ("POST", "/v1/v1/chat/completions", "base_url should be"), ("GET", "/models", "base_url should be"),
    ("POST", "/api/v1/embeddings", "base_url should be"), ("GET", "/api/../api/tags", ""),
    ("POST", "/v1/chat/completions/", "slash"), ("GET", "//api/tags", ""), ("GET", "/api/blobs/", "")])
def test_other_route_is_a_404_and_not_forwarded(start, method, path, hint):
    server, fake = start()
    answer = call(server, method, path)
    assert answer.status == 404 and fake.requests.empty() and answer.headers["X-Request-Id"]
    assert hint in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "not_found_error"


def test_root_answers_the_ollama_program_and_people(start):
    server, _ = start()
    assert call(server, "HEAD", "/").status == 200
    answer = call(server, "GET", "/", headers={"Host": "a.localhost:80"})
    assert b"base_url is http://a.localhost:80/v1" in answer.body


def test_head_is_answered_where_get_is(start):
    server, fake = start(b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 9\r\n\r\n")
    connection = connect(server)
    for _ in range(2):
        connection.request("HEAD", "/api/version")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
    assert fake.requests.get(timeout=DEADLINE)[0] == "HEAD /api/version HTTP/1.1"
    connection.close()


def model_list(*ids):
    return json_answer({"object": "list", "data": [
        {"id": i, "object": "model", "created": 1795385879, "owned_by": "library"} for i in ids]})


def json_answer(value, status=200):
    body = json.dumps(value).encode()
    return b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        status, len(body), body)


@pytest.mark.parametrize("path, name", [
    ("hello:latest", "hello:latest"), ("hello", "hello"), ("hf.co/a/b:Q4", "hf.co/a/b:Q4"),
    ("hf.co%2Fa%2Fb%3AQ4", "hf.co/a/b:Q4")])
def test_model_is_looked_up_in_the_list_by_its_id_whatever_it_contains(start, path, name):
    server, fake = start(model_list("hello:latest", "hf.co/a/b:Q4"))
    assert call(server, "GET", "/v1/models/" + path).json() == {
        "id": name, "object": "model", "created": 1795385879, "owned_by": "library"}
    assert fake.requests.get(timeout=DEADLINE)[0] == "GET /v1/models HTTP/1.1"


def test_missing_model_is_a_404_that_names_the_cure(start):
    server, _ = start(model_list())
    answer = call(server, "GET", "/v1/models/nosuch")
    assert answer.status == 404 and "ollama pull nosuch" in answer.json()["error"]["message"]


@pytest.mark.parametrize("tokens", [[1, 2], [[1, 2]]])
def test_embedding_of_tokens_is_a_400_that_names_the_cure(start, tokens):
    server, fake = start()
    answer = call(server, "POST", "/v1/embeddings", {"model": "m", "input": tokens})
    assert answer.status == 400 and fake.requests.empty()
    assert "check_embedding_ctx_length=False" in answer.json()["error"]["message"]


def test_compressed_body_is_a_415_on_translated_routes_only(start):
    server, fake = start(RECORDED["version"])
    for path, status in ("/v1/chat/completions", 415), ("/v1/responses", 200):
        assert call(server, "POST", path, b"x", {"Content-Encoding": "zstd"}).status == status
    assert fake.requests.get(timeout=DEADLINE)[1]["Content-Encoding"] == "zstd"


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


def test_frames_do_not_wait_for_the_confirmation_of_the_last_one(start, monkeypatch):
    seen = []
    answer = proxy_module.ProxyHandler.answer
    monkeypatch.setattr(proxy_module.ProxyHandler, "answer", lambda self, first: seen.append(
        self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) or answer(self, first))
    server, _ = start()
    assert call(server, "GET", "/").status == 200 and seen and seen[0]


def test_refusal_reaches_a_client_that_is_still_sending(start):
    server, _ = start(api_key=(("", "sk-bob-01234567"),))
    for _ in range(5):
        assert call(server, "POST", "/v1/chat/completions", b"x" * (8 << 20)).status == 401


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

    server, fake = start(HEAD, Endless(chunk(says("more"))), size=1)
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
    """Send bytes and FIN, read until the proxy closes. FIN is no hang-up here."""
    with mock.patch.object(proxy_module, "has_hung_up", lambda client: False), socket.create_connection(("127.0.0.1", server.server_port), DEADLINE) as client:
        client.sendall(data)
        with contextlib.suppress(OSError):  # the proxy was faster
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
    (b"POST /v1/chat/completions HTTP/1.1\r\n\r\n", 411),
    (b"GET /v1/models HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
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
    request_bytes = request_bytes.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nHost: localhost\r\n")
    answer = raw(server, request_bytes + b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
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
    answer = call(server, "POST", "/v1/v1/messages", {})
    assert answer.json()["error"]["message"].endswith(f" should be {server.url} here")
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


def test_unknown_field_that_is_half_an_emoji_is_named(start):
    server, _ = start(RECORDED["hello"])
    answer = call(server, "POST", "/v1/chat/completions",
                  b'{"model":"m","messages":[],"\\ud83d":1}')
    assert answer.status == 200 and answer.headers["X-Ignored-Fields"] == "%5Cud83d"


def test_nesting_that_can_be_read_but_not_written_is_no_fault_of_the_proxy(start):
    server, _ = start(RECORDED["length"])
    low, high = 1, 100_000  # the deepest nesting that still goes through; then its neighbours
    def status(depth):
        body = b'{"model":"m","messages":[],"options":{"x":' + b"[" * depth + b"]" * depth + b"}}"
        return call(server, "POST", "/v1/chat/completions", body).status
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if status(middle) == 200 else (low, middle)
    # (which is not at quite the same depth each time)
    assert {status(depth) for depth in range(high - 12, high + 12)} == {200, 400}


def test_many_tool_calls_and_long_answers_take_linear_time():
    calls = [{"id": f"c{i}", "function": {"name": "f", "arguments": {}}} for i in range(40_000)]
    s = new_stream()
    choices = s.feed({"message": {"tool_calls": calls}}) + s.feed({"done": True})
    assert len(whole(choices)["message"]["tool_calls"]) == 40_000


def test_path_that_is_not_ascii_is_a_400(start):
    server, _ = start()
    assert raw(server, "GET /api/tags?é HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).startswith(b"HTTP/1.1 400 ")
    assert raw(server, b"GET /api/tags?\x01 HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_only_http_1_1_is_told_to_go_on(start):
    server, _ = start(RECORDED["length"])
    for version, told in ("1.0", False), ("1.1", True):
        request = (f"POST /v1/chat/completions HTTP/{version}\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                   f"Content-Length: {len(BODY)}\r\n\r\n").encode() + BODY
        assert raw(server, request).startswith(b"HTTP/1.1 100 ") == told


@pytest.mark.parametrize("version, wish, kept", [
    ("1.1", "Connection: keep-alive\r\nConnection: close\r\n", False),
    ("1.0", "", False), ("1.0", "Connection: Keep-Alive\r\n", False), ("1.1", "", True),
    ("1.1", "Connection: close\r\n", False), ("1.1", "Connection: x, Close\r\n", False)])
def test_connection_is_kept_as_the_version_and_the_client_want_it(start, version, wish, kept):
    server, _ = start()
    client = Client(server, path=None)
    client.socket.sendall(f"GET /healthz HTTP/{version}\r\nHost: localhost\r\n{wish}\r\n".encode())
    assert client.read_until(b"ok\n").endswith(b"\r\n\r\nok\n")
    if kept:
        client.ask("/healthz", "GET")
    assert client.read_until(b"ok\n").endswith(b"ok\n") == kept
    client.leave()


def test_garbage_after_a_stream_on_the_same_connection_is_a_400_of_its_own(start):
    server, _ = start(RECORDED["length"])
    body = b'{"model":"m","messages":[],"stream":true}'
    answer = raw(server, b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                 b"Content-Length: %d\r\n\r\n%bGARBAGE\r\n\r\n" % (len(body), body))
    assert answer.count(b"HTTP/1.1 200") == 1 and answer.count(b"HTTP/1.1 400 ") == 1


def test_whole_answer_has_its_usage_whatever_the_stream_options_say(start):
    server, _ = start(RECORDED["hello"])
    assert "usage" in chat(server, False, stream_options={"include_usage": False}).json()


@pytest.mark.parametrize("data", [[None], [5], [[]], [{}], [{"id": 1}], {}, 5])
def test_list_of_models_that_is_malformed_is_a_breach_of_protocol(start, data):
    server, _ = start(json_answer({"data": data}))
    assert_failed(call(server, "GET", "/v1/models"), 502, "upstream_protocol")


@pytest.mark.parametrize("body", [b'{"data":null}', b'{"data":[]}', b"{}"])
def test_no_models_are_an_empty_list(start, body):
    server, _ = start(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    assert call(server, "GET", "/v1/models").json() == {"object": "list", "data": []}


def test_fault_of_the_proxy_itself_is_a_500_and_its_traceback_is_logged(start, monkeypatch, log):
    monkeypatch.setattr(proxy_module, "translate", lambda *_: 1 / 0)
    server, _ = start(RECORDED["hello"])
    answer = chat(server)
    assert answer.status == 500 and answer.json()["error"]["type"] == "server_error"
    assert "ZeroDivisionError" in "\n".join(log.queue)


# ---- HTTP without ambiguity --------------------------------------------------------------------

BODY = b'{"model":"m","messages":[]}'
POST = b"POST /v1/chat/completions HTTP/1.1\r\n"
HOST = b"Host: localhost\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


@pytest.mark.parametrize("head, status", [
    # two readings of where the body ends
    (POST + HOST + LENGTH + LENGTH, 400),
    (POST + HOST + LENGTH + b"Content-Length: 0\r\n", 400),
    (POST + HOST + b"Content-Length: 27, 27\r\n", 400),
    *[(POST + HOST + b"Content-Length: %b\r\n" % value, 400) for value in (
        b"", b"+27", b"-1", b"0x1b", b"1_0", b"27 ", b"2 7", b"27;", b"\xd9\xa2", b"1" * 30)
      if value != b"27 "],
    (POST + HOST + LENGTH + b"Transfer-Encoding: chunked\r\n", 400),
    (POST + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
    (POST.replace(b"1.1", b"1.0") + HOST + b"Transfer-Encoding: chunked\r\n", 400),
    (POST + HOST + b"Transfer-Encoding: identity\r\n" + LENGTH, 400),
    (POST + HOST + b"transfer-encoding: xchunked\r\n", 400),
    (POST + HOST + b"Transfer-Encoding : chunked\r\n", 400),
    (POST + HOST + b"Transfer_Encoding: chunked\r\n", 411),  # another header; no length then
    # lines and their ends
    (POST + HOST + LENGTH + b"X: a\r\n folded\r\n", 400),
    (POST + b" " + HOST + LENGTH, 400),
    (POST + HOST + LENGTH + b"X: a\rContent-Length: 0\r\n", 400),
    (POST + HOST + LENGTH + b"X: a\nContent-Length: 0\r\n", 400),
    (POST + HOST + LENGTH + b"X: a\n", 400),
    (POST[:-2] + b"\n" + HOST + LENGTH, 400),
    (POST + HOST + LENGTH + b"X: a\x00b\r\n", 400),
    (POST + HOST + LENGTH + b"X: \x1b[2J\r\n", 400),
    (POST + HOST + LENGTH + b"X: \x7f\r\n", 400),
    # names
    (POST + HOST + LENGTH + b"no colon\r\n", 400),
    (POST + HOST + LENGTH + b": empty\r\n", 400),
    (POST + HOST + LENGTH + b"X Y: a\r\n", 400),
    (POST + HOST + LENGTH + b"X\t: a\r\n", 400),
    (POST + HOST + LENGTH + "Ü: a\r\n".encode(), 400),
    # Host
    (POST + LENGTH, 400),
    (POST + HOST + HOST + LENGTH, 400),
    (POST + b"Host: \r\n" + LENGTH, 400),
    (POST + b"Host: a b\r\n" + LENGTH, 400),
    (POST + b"Host: localhost/x\r\n" + LENGTH, 400),
    (POST + b"Host: user@localhost\r\n" + LENGTH, 400),
    (POST + b"Host: localhost:1x\r\n" + LENGTH, 400),
    (POST + HOST + LENGTH + b"Authorization: a\r\nauthorization: b\r\n", 400),
    # the request line
    (b"POST  /v1/chat/completions HTTP/1.1\r\n" + HOST + LENGTH, 400),
    (b"POST /v1/chat/completions  HTTP/1.1\r\n" + HOST + LENGTH, 400),
    (b"POST /v1/chat /completions HTTP/1.1\r\n" + HOST + LENGTH, 400),
    (b"POST /v1/chat/completions\r\n" + HOST + LENGTH, 400),
    (b"GET /api/tags\r\n", 400),
    (b"POST\t/v1/chat/completions\tHTTP/1.1\r\n" + HOST + LENGTH, 400),
    (b" POST /v1/chat/completions HTTP/1.1\r\n" + HOST + LENGTH, 400),
    (b"\r\n" + POST + HOST + LENGTH, 400),
    (b"PO(ST /v1/chat/completions HTTP/1.1\r\n" + HOST + LENGTH, 400),
    *[(b"POST /v1/chat/completions HTTP/%b\r\n" % version + HOST + LENGTH, status)
      for version, status in [(b"2.0", 505), (b"1.2", 505), (b"0.9", 505), (b"1.10", 505), (b"1.00", 505),
                              (b"1", 400), (b"1.1x", 400), (b"+1.1", 400)]],
    (b"POST /v1/chat/completions http/1.1\r\n" + HOST + LENGTH, 400),
    (b"POST http://localhost/v1/chat/completions HTTP/1.1\r\n" + HOST + LENGTH, 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
    # sizes
    (POST + HOST + LENGTH + b"X: " + b"a" * 65536 + b"\r\n", 431),
    (POST + HOST + LENGTH + b"".join(b"X-%d: a\r\n" % i for i in range(100)), 431),
    (b"GET /" + b"a" * 65536 + b" HTTP/1.1\r\n" + HOST, 414),
    # paths
    *[(b"GET %b HTTP/1.1\r\n" % path + HOST, 404) for path in (
        b"/api%2ftags", b"/api%2Ftags", b"/api/%2e%2e/api/tags", b"/api/./tags", b"/v1/../api/tags",
        b"//api/tags", b"/api//tags", b"/api/tags%00", b"/api/tags/", b"/api%252ftags", b"/API/tags",
        b"/api/tags;x", b"/v1/models/")],
    *[(b"GET %b HTTP/1.1\r\n" % path + HOST, 400) for path in (b"\\api\\tags", b"*", b"api/tags", b"?")],
    *[(b"HEAD /api/blobs/%b HTTP/1.1\r\n" % path + HOST, 404) for path in (
        b"../tags", b"a/../../tags", b"%2e%2e", b"a%2fb", b"")],
])
def test_ambiguous_request_is_refused_and_the_connection_closed(start, log, head, status):
    server, fake = start()
    answer = raw(server, head + b"\r\n" + BODY + b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1 and fake.requests.empty()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in head
    assert "end=error" in log.get(timeout=DEADLINE)  # and no traceback
    assert not body or json.loads(body)["error"]["message"]


@pytest.mark.parametrize("head", [
    POST + HOST + LENGTH, POST + b"host:localhost\r\ncontent-length:%d  \r\n" % len(BODY),
    POST + HOST + LENGTH + b"X: \r\nX:\tb\r\nY: \xfc\r\n", POST.replace(b"1.1", b"1.0") + LENGTH,
    POST + b"Host: [::1]:80\r\n" + LENGTH, POST + b"Host: box.localhost\r\n" + LENGTH,
    b"POST /v1/chat%2Dcompletions".replace(b"%2D", b"/") + b"?a=%2F HTTP/1.1\r\n" + HOST + LENGTH])
def test_plain_request_is_not_refused(start, head):
    server, _ = start(RECORDED["length"])
    assert raw(server, head + b"\r\n" + BODY).startswith(b"HTTP/1.1 200 ")


# ---- Authenticate ------------------------------------------------------------------------------

ALICE, BOB = ("alice", "sk-alice-0123"), ("", "sk-bob-01234567")


def bearer(key):
    return {"Authorization": "Bearer " + key}


@pytest.mark.parametrize("headers, status", [
    ({}, 401), (bearer("wrong-key-00"), 401), (bearer(""), 401), (bearer("sk-alice-012"), 401),
    ({"Authorization": "Basic sk-alice-0123"}, 401), ({"Authorization": "sk-alice-0123"}, 401),
    (bearer("alice:sk-alice-0123"), 401), (bearer("\xfc" * 9), 401), ({"x-api-key": "nope-nope"}, 401),
    (bearer("sk-alice-0123"), 200), ({"authorization": "bearer  sk-bob-01234567 "}, 200),
    ({"x-api-key": "sk-alice-0123"}, 200)])
def test_only_who_has_a_key_may_call(start, log, headers, status):
    server, fake = start(RECORDED["hello"], api_key=(ALICE, BOB))
    for method, path in ("GET", "/v1/models"), ("POST", "/api/chat"), ("GET", "/metrics"):
        answer = call(server, method, path, b"{}" if method == "POST" else None, headers)
        assert (answer.status == 401) == (status == 401)
    answer = call(server, "GET", "/nosuch", headers=headers)
    assert answer.status == (401 if status == 401 else 404)
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer" and fake.requests.empty()
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "route=/v1/models status=401" in log.get(timeout=DEADLINE)
    log = "\n".join(log.queue)
    assert "sk-" not in log and "nope" not in log and "wrong" not in log


def test_health_and_front_page_need_no_key(start):
    server, _ = start(api_key=(ALICE,))
    assert call(server, "GET", "/healthz").status == 200
    assert call(server, "GET", "/").status == 200
    assert call(server, "GET", "/metrics").status == 401


def test_refusal_comes_before_the_body_is_read(start):
    server, _ = start(api_key=(ALICE,))
    with socket.create_connection(("127.0.0.1", server.server_port), DEADLINE) as client:
        client.sendall(POST + HOST + b"Content-Length: 999999\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 401"


def write_keys(path, text):
    """A new file in the old one's place, as editors and admins do it; not a young one."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.utime(str(new), (time.time() - 9,) * 2)
    os.replace(str(new), str(path))


def test_key_file_is_read_anew_when_it_changes(start, tmp_path, log):
    path = tmp_path / "keys"
    write_keys(path, "# callers\n\nalice:sk-alice-0123\nsk-bob-01234567\n")
    server, _ = start(model_list("m"), api_key_file=str(path))

    def status(key):
        return call(server, "GET", "/v1/models", headers=bearer(key)).status
    assert (status("sk-alice-0123"), status("sk-bob-01234567")) == (200, 200)
    write_keys(path, "sk-bob-01234567\n")
    assert (status("sk-alice-0123"), status("sk-bob-01234567")) == (401, 200)
    write_keys(path, "sk-bob-01234567\nshort\n")  # broken: the old ones stay, and it says so, once
    assert (status("sk-bob-01234567"), status("sk-alice-0123")) == (200, 401)
    assert "\n".join(log.queue).count("the previous keys stay valid") == 1
    path.unlink()
    assert status("sk-bob-01234567") == 200
    write_keys(path, "")  # nobody has a key any more; that is not the same as asking for none
    assert (status("sk-bob-01234567"), status("")) == (401, 401)


def test_revoked_key_does_not_cut_the_stream_under_way(start, tmp_path):
    path, more = tmp_path / "keys", threading.Event()
    write_keys(path, "sk-bob-01234567\n")
    server, _ = start(SAID, more, chunk(FINAL) + b"0\r\n\r\n", api_key_file=str(path))
    connection = connect(server)
    connection.request("POST", "/v1/chat/completions", json.dumps(
        {"model": "m", "messages": [], "stream": True}), bearer("sk-bob-01234567"))
    response = connection.getresponse()
    response.readline()
    write_keys(path, "")
    assert call(server, "GET", "/v1/models", headers=bearer("sk-bob-01234567")).status == 401
    more.set()
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()


@pytest.mark.parametrize("host, local", [
    ("localhost", True), ("LOCALHOST:1", True), ("127.0.0.1", True), ("[::1]:11435", True),
    ("a.localhost", True), ("box.local", True), ("BOX.internal:80", True), ("box", True),
    ("192.0.2.1", True), ("evil.example", False), ("localhost.evil.example", False),
    ("127.0.0.1.evil.example", False), ("local", True), ("box.locale", False)])
def test_host_must_be_local_unless_keys_are_set(start, host, local):
    for settings in {}, {"insecure": True}:
        answer = call(start(**settings)[0], "GET", "/healthz", headers={"Host": host})
        assert answer.status == (200 if local else 403)
    assert call(start(api_key=[ALICE])[0], "GET", "/healthz", headers={"Host": host}).status == 200


@pytest.mark.parametrize("origin, local", [
    ("http://localhost:3000", True), ("https://127.0.0.1", True), ("http://[::1]:5", True),
    ("app://obsidian.md", True), ("tauri://localhost", True), ("https://chat.example", False),
    ("http://evil.example", False), ("null", False), ("http://localhost.evil.example", False),
    ("http://localhost:1@evil.example", False)])
def test_page_must_be_local_unless_keys_are_set_even_for_a_simple_request(start, hooks, origin, local):
    accept = hooks("def authenticate(headers): return 'anyone'")
    for settings in {}, {"insecure": True}, {"hooks": accept}, {"hooks": accept, "api_key": [ALICE]}:
        server, fake = start(RECORDED["hello"], **settings)
        answer = call(server, "POST", "/v1/chat/completions", {"model": "m", "messages": []},
                      {"Origin": origin, "Content-Type": "text/plain"})
        assert answer.status == (200 if local else 403) and fake.requests.empty() != local
        assert answer.headers["Access-Control-Allow-Origin"] == (origin if local else None)
    server, _ = start(RECORDED["hello"], api_key=[ALICE])
    for headers, status in ({}, 401), (bearer(ALICE[1]), 200):
        answer = call(server, "POST", "/v1/chat/completions", {"model": "m", "messages": []},
                      {"Origin": origin, **headers})
        assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (status, "*")
        assert "Access-Control-Allow-Credentials" not in answer.headers


def test_own_page_may_call(start):
    server, _ = start()
    host = f"127.0.0.1:{server.server_port}"
    assert call(server, "GET", "/healthz", headers={"Origin": "http://" + host, "Host": host}).status == 200


def test_preflight_allows_the_headers_it_asks_for_without_a_key(start):
    server, _ = start()
    asked = "authorization,content-type, x-stainless-arch"
    answer = call(server, "OPTIONS", "/v1/chat/completions", headers={
        "Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked})
    assert answer.status == 200 and answer.headers["Access-Control-Allow-Headers"] == asked
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST, OPTIONS"
    assert "x-request-id" in answer.headers["Access-Control-Expose-Headers"]
    for origin, wished, status in ("http://evil.example", "a", 403), ("http://localhost", "a;b", 400):
        assert call(server, "OPTIONS", "/", headers={
            "Origin": origin, "Access-Control-Request-Headers": wished}).status == status
    server, _ = start(api_key=[ALICE])
    answer = call(server, "OPTIONS", "/v1/models", headers={"Origin": "https://chat.example"})
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "*")


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_unsafe_exposure_is_refused_at_the_start(listen):
    with pytest.raises(ValueError, match="--insecure"):
        ProxyServer(make_settings("box", listen=parse_url(listen)))


@pytest.mark.parametrize("settings", [{"api_key": (ALICE,)}, {"insecure": True}])
def test_other_addresses_are_served_with_keys_or_by_wish(settings):
    server = ProxyServer(make_settings("box", listen=parse_url("0.0.0.0:0"), **settings))
    assert server.url == f"http://127.0.0.1:{server.server_port}"  # an address that works
    server.server_close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """The paths of a self-signed certificate for localhost and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key),
         "-out", str(cert)], capture_output=True, check=False) if shutil.which("openssl") else None
    if made is None or made.returncode:
        pytest.skip("openssl can't make a certificate here")
    return str(cert), str(key)


def test_https_serves_streams_and_notices_a_hang_up(start, certificate):
    cert, key = certificate
    more = threading.Event()
    server, fake = start(SAID, more, chunk(says("more")) * 1000, tls_cert=cert, tls_key=key)
    assert server.url.startswith("https://")
    context = ssl.create_default_context(cafile=cert)
    silent = socket.create_connection(("127.0.0.1", server.server_port))  # never shakes hands
    connection = http.client.HTTPSConnection("127.0.0.1", server.server_port, timeout=DEADLINE,
                                             context=context)
    connection.request("POST", "/v1/chat/completions", json.dumps(
        {"model": "m", "messages": [], "stream": True}))
    response = connection.getresponse()
    assert response.readline().startswith(b"data: {")
    response.close()
    connection.close()
    more.set()
    assert fake.hung_up.wait(DEADLINE)
    silent.close()


def test_plain_http_to_an_https_port_is_closed(start, certificate):
    server, _ = start(tls_cert=certificate[0], tls_key=certificate[1])
    with contextlib.suppress(ConnectionError):
        assert not raw(server, b"GET /healthz HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_odd_heads_cost_no_time_and_no_traceback(start, log):
    server, fake = start(RECORDED["version"])
    spaces = POST + HOST + LENGTH + b"X:" + b" " * 60_000 + b"\x00\r\n\r\n"
    assert raw(server, spaces).startswith(b"HTTP/1.1 400 ")
    for odd in (b"multipart/mixed; boundary*=idna''abc", b"multipart/mixed; boundary*=undefined''x",
                b'multipart/mixed; "' + b";" * 60_000, b"multipart/mixed; boundary*" + b"9" * 5000 + b"=x"):
        answer = raw(server, POST.replace(b"/v1/chat/completions", b"/api/show") + HOST + LENGTH
                     + b"Content-Type: " + odd + b"\r\n\r\n" + BODY)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert fake.requests.get(timeout=DEADLINE)[1]["Content-Type"].encode() == odd
    assert "Traceback" not in "".join(log.queue), "\n".join(log.queue)[-3000:]


def test_odd_headers_of_the_upstream_are_its_own_fault(start, log):
    for header in (b"Content-Type: multipart/mixed; boundary*=idna''abc", b"Content-Length: \xb2",
                   b"Retry-After: 1\r\n X: y", b"Content-Type: a/b;\r\n X: y"):
        server, _ = start(b"HTTP/1.1 503 x\r\n" + header + b"\r\n\r\n{}")
        answer = call(server, "GET", "/api/version")
        assert answer.status in (502, 503) and "X" not in answer.headers
    assert "Traceback" not in "".join(log.queue), "\n".join(log.queue)[-3000:]


def test_upload_is_asked_for_only_when_it_is_welcome(start):
    server, _ = start(RECORDED["length"], api_key=(ALICE,))
    head = POST + HOST + LENGTH + b"Expect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", server.server_port), DEADLINE) as client:
        client.sendall(head + b"\r\n")
        assert client.recv(12) == b"HTTP/1.1 401"
    with socket.create_connection(("127.0.0.1", server.server_port), DEADLINE) as client:
        client.sendall(head + b"x-api-key: sk-alice-0123\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(BODY)
        assert client.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("request_line", [b"GET / ", b"GET /healthz ", b"OPTIONS /healthz "])
def test_body_where_none_belongs_is_not_read(start, request_line):
    server, _ = start()
    with socket.create_connection(("127.0.0.1", server.server_port), DEADLINE) as client:
        client.sendall(request_line + b"HTTP/1.1\r\n" + HOST + b"Origin: http://localhost\r\n"
                       b"Content-Length: 9999999\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize("status", [204, 304])
def test_passed_status_without_a_body_leaves_the_connection_in_step(start, status):
    server, fake = start(b"HTTP/1.1 %d x\r\n\r\n" % status)
    connection = connect(server)
    for _ in range(2):
        connection.request("POST", "/api/show", b"{}")
        assert connection.getresponse().read() == b""
    fake.steps = [RECORDED["version"]]
    connection.request("GET", "/api/version")
    assert connection.getresponse().read() == b'{"version":"0.0.0"}'
    connection.close()


def test_key_file_that_could_not_be_opened_for_a_moment_is_tried_again(tmp_path, monkeypatch, log):
    path = tmp_path / "keys"
    write_keys(path, "sk-bob-01234567\n")
    keys = proxy_module.Keys([], str(path))
    write_keys(path, "sk-alice-0123\n")

    def out_of_descriptors(*args, **kwargs):
        raise OSError(24, "Too many open files")
    with monkeypatch.context() as patch:
        patch.setattr(proxy_module, "open", out_of_descriptors, raising=False)
        assert keys.owner("sk-bob-01234567") == "key-1"  # the old ones stay, and it says so
        assert "Too many open files" in log.get(timeout=DEADLINE)
    assert keys.owner("sk-bob-01234567") is None and keys.owner("sk-alice-0123") == "key-1"


# ---- Streams hold ------------------------------------------------------------------------------


class Client:
    """A client's bare socket: what it sends when, and how it goes away, is up to the test."""

    def __init__(self, server, path="/v1/chat/completions", method="POST", headers=(), **fields):
        self.socket = socket.create_connection(("127.0.0.1", server.server_port), DEADLINE)
        if path:
            self.ask(path, method, headers, **fields)

    def ask(self, path="/v1/chat/completions", method="POST", headers=(), **fields):
        body = json.dumps({"model": "m", "messages": [], "stream": True, **fields}).encode()
        body = body if method == "POST" else b""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def read_until(self, end, times=1):
        """What comes, until it has this text so many times, or to the end of the connection."""
        seen = b""
        while seen.count(end) < times:
            more = self.socket.recv(65536)
            if not more:
                break
            seen += more
        return seen

    def leave(self, ending="FIN"):
        if ending == "RST":
            reset_on_close(self.socket)
        self.socket.close()


@pytest.fixture(params=["POLLRDHUP", "peek"])
def looks(request, monkeypatch):
    """Both ways to see a hang-up: that of Linux, and that of all others."""
    if request.param == "peek":
        monkeypatch.delattr(select, "POLLRDHUP", raising=False)
    elif not hasattr(select, "POLLRDHUP"):
        pytest.skip("no POLLRDHUP here")


@pytest.mark.parametrize("ending", ["FIN", "RST"])
@pytest.mark.parametrize("method, path, headers, stream, steps", [
    ("POST", "/v1/chat/completions", [], True, [HOLD]),  # a model loads, or others come first
    ("POST", "/v1/chat/completions", [], True, [HEAD, HOLD]),
    ("POST", "/v1/chat/completions", [], True, [SAID, HOLD]),
    ("POST", "/v1/chat/completions", [], False, [HOLD]), ("POST", "/v1/chat/completions", [], False, [SAID, HOLD]),
    ("GET", "/v1/models", [], True, [HOLD]),
    ("POST", "/v1/messages", [], True, [HOLD]), ("POST", "/v1/embeddings", [], False, [HEAD, HOLD]),
    ("POST", "/api/chat", [], True, [SAID, HOLD]),
    ("POST", "/api/chat", ["Accept: text/event-stream"], True, [HOLD]),
    ("POST", "/api/chat", ["Accept: text/event-stream"], True, [SAID, HOLD])])
def test_client_that_goes_away_closes_the_upstream_connection(
        start, log, looks, ending, method, path, headers, stream, steps):
    server, fake = start(*steps, log="json")
    client = Client(server, path, method, headers, stream=stream, prompt="x")
    fake.requests.get(timeout=DEADLINE)
    if SAID in steps and stream:
        client.read_until(b"some")
    client.leave(ending)
    assert fake.left.wait(DEADLINE)
    assert records(log, 1)[0]["end"] == "client hang-up"


def test_client_that_goes_away_under_tls_closes_the_upstream_connection(start, certificate):
    server, fake = start(HOLD, tls_cert=str(certificate[0]), tls_key=str(certificate[1]))
    context = ssl.create_default_context(cafile=str(certificate[0]))
    client = Client(server, path=None)
    client.socket = context.wrap_socket(client.socket, server_hostname="localhost")
    client.ask()
    fake.requests.get(timeout=DEADLINE)
    client.leave()
    assert fake.left.wait(DEADLINE)


def test_client_that_goes_away_while_it_is_written_to_frees_the_thread(start):
    endless = chunk(says("x" * 1000)) * 20_000
    server, fake = start(HEAD, endless)
    client = Client(server)
    client.read_until(b"xxx")
    client.leave("RST")
    assert fake.hung_up.wait(DEADLINE)


def test_pipelined_request_is_no_hang_up_and_is_answered_next(start, looks):
    more = threading.Event()
    server, fake = start(SAID, more, chunk(FINAL) + b"0\r\n\r\n", heartbeat=0.01)
    client = Client(server)
    client.ask()
    client.read_until(b"some")
    client.read_until(b'"delta":{}')  # a heartbeat: the proxy has looked and seen no hang-up
    more.set()
    assert client.read_until(b"[DONE]", 2).count(b"[DONE]") == 2
    client.leave()


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


def poll(condition):
    """Wait until it is true."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the time is up"
        threading.Event().wait(0.01)


def test_thousand_aborts_leave_no_thread_descriptor_or_memory_behind(start, log):
    rng, (server, fake) = random.Random(7), start(SAID, HOLD)

    def abort(count):
        clients = [Client(server, stream=rng.random() < 0.7) for _ in range(count)]
        for _ in clients:
            fake.requests.get(timeout=DEADLINE)
        for client in clients:
            client.leave(rng.choice(["FIN", "RST"]))
        poll(lambda: not server.connections and not server.observer.active)
        log.queue.clear()

    def counts():
        poll(lambda: threading.active_count() <= threads)
        gc.collect()
        return descriptors(), len(gc.get_objects())
    threads = threading.active_count()
    abort(100)
    before = counts()
    for _ in range(10):
        abort(100)
    after = counts()
    assert after[0] <= before[0] and after[1] < before[1] + 500


def frames_of(seen):
    """The frames in a chunked answer's bytes, without the sizes of chunks."""
    return [json.loads(text) for text in re.findall(rb"^data: (\{.*\})$", seen, re.MULTILINE)]


def test_stream_gets_heartbeats_before_the_first_record_and_says_its_role_once(start):
    more = threading.Event()
    server, _ = start(more, SAID, chunk(FINAL) + b"0\r\n\r\n", heartbeat=0.01)
    client = Client(server)
    seen = client.read_until(b'"delta":{}', 3)
    more.set()
    frames = frames_of(seen + client.read_until(b"[DONE]"))
    deltas = [frame["choices"][0]["delta"] for frame in frames if frame["choices"][0]["index"] == 0]
    assert deltas[:3] == [{"role": "assistant", "content": ""}, {}, {}]
    assert sum("role" in delta for delta in deltas) == 1 and {"content": "some"} in deltas
    assert all(frame["choices"][0]["finish_reason"] is None for frame in frames[:3])
    assert len({frame["id"] for frame in frames}) == 1
    client.leave()


@pytest.mark.parametrize("path, headers, beat", [
    ("/api/chat", ["Accept: text/event-stream"], b": heartbeat\n\n")])
def test_other_streams_get_heartbeats_in_their_own_form(start, path, headers, beat):
    more = threading.Event()
    server, _ = start(HEAD, more, heartbeat=0.01)
    client = Client(server, path, headers=headers, prompt="x")
    assert beat in client.read_until(beat)
    more.set()
    seen = client.read_until(b"\r\n0\r\n\r\n")
    assert b'"code":"upstream_cut"' in seen and b"[DONE]" not in seen
    client.leave()


@pytest.mark.parametrize("path, headers", [
    ("/v1/chat/completions", []), ("/api/chat", ["Accept: text/event-stream"])])
def test_failure_keeps_its_status_before_a_heartbeat_and_is_a_frame_after_it(start, path, headers):
    more = threading.Event()
    server, fake = start(more, RECORDED["missing"], heartbeat=0.01)
    client = Client(server, path, headers=headers)
    fake.requests.get(timeout=DEADLINE)
    seen = client.read_until(b"\n\n")
    more.set()
    seen += client.read_until(b"\r\n0\r\n\r\n")
    assert seen.startswith(b"HTTP/1.1 200 ") and b"ollama pull nosuch" in seen and b"[DONE]" not in seen
    assert b'"code":"model_not_found"' in seen
    client.leave()
    server, _ = start(RECORDED["missing"], heartbeat=60)
    assert call(server, "POST", path, {"model": "m", "messages": [], "stream": True}).status == 404


def test_heartbeat_of_0_sends_none(start, monkeypatch):
    looked, more = threading.Semaphore(0), threading.Event()
    silence = proxy_module.Reply.silence
    monkeypatch.setattr(proxy_module.Reply, "silence", lambda self: (silence(self), looked.release()))
    server, _ = start(more, RECORDED["length"], heartbeat=0)
    client = Client(server)
    for _ in range(20):
        assert looked.acquire(timeout=DEADLINE)
    more.set()
    seen = client.read_until(b"[DONE]")
    assert seen.count(b'"delta":{}') == 1
    client.leave()


def drip(client, data):
    """Send bytes one at a time, until the server answers or hangs up; return what it says."""
    for i in range(len(data)):
        try:
            client.socket.sendall(data[i:i + 1])
        except OSError:
            break
        if select.select([client.socket], [], [], 0.02)[0]:
            break
    else:
        raise AssertionError("the server has waited for all of it")
    return client.read_until(b"\r\n0\r\n\r\n")


def test_head_that_drips_is_a_408_when_its_time_is_up(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "CLIENT_SECONDS", 0.2)
    server, _ = start()
    client = Client(server, path=None)
    client.socket.sendall(POST)
    answer = drip(client, b"X: " + b"x" * 10_000)
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer
    client.leave()


def test_body_that_drips_is_a_408_when_its_time_is_up(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "BODY_SECONDS", 0.2)
    server, _ = start()
    client = Client(server, path=None)
    client.socket.sendall(POST + HOST + b"Content-Length: 10000\r\n\r\n")
    assert drip(client, b"x" * 9_999).startswith(b"HTTP/1.1 408 ")
    client.leave()


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat"])
def test_connection_that_idles_is_closed(start, monkeypatch, sent):
    monkeypatch.setattr(proxy_module, "CLIENT_SECONDS", 0.1)
    server, _ = start(RECORDED["length"])
    client = Client(server)
    assert client.read_until(b"\r\n0\r\n\r\n").endswith(b"\r\n0\r\n\r\n")
    client.socket.sendall(sent)
    assert client.read_until(b"never") == b""
    poll(lambda: not server.connections)
    client.leave()


def test_client_that_does_not_read_is_cut_and_pushes_back_meanwhile(start, monkeypatch, log):
    monkeypatch.setattr(proxy_module, "CLIENT_SECONDS", 0.3)
    endless = Endless(chunk(says("x" * 10_000)))
    server, fake = start(HEAD, endless, size=1, log="json")
    client = Client(server)
    assert fake.hung_up.wait(DEADLINE)
    assert records(log, 1)[0]["end"] == "client hang-up"
    assert endless.sent < 64 << 20  # what two sockets' buffers hold, and not all that was said
    client.leave()


def test_slow_reader_that_goes_on_reading_is_not_cut(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "CLIENT_SECONDS", 1.0)
    server, _ = start(HEAD + chunk(says("x" * 3_000_000)) + chunk(FINAL) + b"0\r\n\r\n")
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # connections inherit it
    client = Client(server, path=None)
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.ask("/api/chat", headers=["Accept: text/event-stream"])
    begun, seen = time.monotonic(), 0
    while time.monotonic() < begun + 2:  # longer than a limit for the whole frame
        threading.Event().wait(0.02)
        seen += len(client.socket.recv(4096))
    assert seen < 3_000_000 and b"data: [DONE]" in client.read_until(b"[DONE]")
    client.leave()


def test_whole_answer_that_never_ends_is_refused_at_the_cap(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "MAX_BODY_BYTES", 10_000)
    server, fake = start(HEAD, chunk(says("x" * 1000)) * 20)
    assert_failed(chat(server, stream=False), 502, "upstream_protocol")
    assert_failed(chat(server, tools=[function("f")], tool_choice="required"), 502, "upstream_protocol")
    fake.steps = (HEAD, chunk(says("x" * 1000)) * 20 + chunk(FINAL))
    assert len(chat(server).text()) == 20_000


def test_one_connection_too_many_is_a_503_at_once_and_health_still_answers(start):
    more = threading.Event()
    server, fake = start(SAID, more, chunk(FINAL) + b"0\r\n\r\n", max_connections=2)
    clients = [Client(server), Client(server)]
    for client in clients:
        client.read_until(b"some")
    answer = chat(server)
    assert answer.status == 503 and answer.headers["Retry-After"] == "1"
    assert answer.headers["Connection"] == "close" and answer.json()["error"]["code"] == "proxy_busy"
    assert call(server, "GET", "/healthz").status == call(server, "GET", "/metrics").status == 200
    more.set()
    for client in clients:
        assert b"[DONE]" in client.read_until(b"[DONE]")
        client.leave()
    poll(lambda: not server.connections)
    assert chat(server).status == 200


def test_far_too_many_connections_are_closed_without_a_thread(start):
    server, _ = start()
    server.settings.max_connections = -proxy_module.MAX_EXTRA
    threads = threading.active_count()
    client = Client(server, path=None)
    with contextlib.suppress(ConnectionResetError):
        assert client.socket.recv(1) == b""
    assert threading.active_count() <= threads
    client.leave()


def draining(server):
    """drain() in a thread: (thread, a list that gets its result)."""
    results = []
    thread = threading.Thread(target=lambda: results.append(server.drain()))
    thread.start()
    poll(lambda: server.draining and server.socket.fileno() < 0)
    return thread, results


def test_drain_lets_a_stream_end_and_refuses_new_requests(start):
    more = threading.Event()
    server, _ = start(SAID, more, chunk(FINAL) + b"0\r\n\r\n")
    streaming, idle = Client(server), Client(server, "/healthz", "GET")
    idle.read_until(b"ok\n")
    streaming.read_until(b"some")
    thread, results = draining(server)
    with pytest.raises(OSError):
        Client(server)
    idle.ask()
    refusal = idle.read_until(b"}}")
    assert refusal.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1" in refusal and b"close" in refusal
    more.set()
    assert b"data: [DONE]\n\n" in streaming.read_until(b"never")  # and then the connection is closed
    thread.join(DEADLINE)
    assert results == [True]
    streaming.leave()
    idle.leave()


def test_drain_says_an_error_to_what_is_left_when_time_is_up(start, monkeypatch):
    monkeypatch.setattr(proxy_module, "DRAIN_SECONDS", 0.1)
    server, fake = start(SAID, HOLD)
    streaming, whole = Client(server), Client(server, stream=False)
    for _ in range(2):
        fake.requests.get(timeout=DEADLINE)
    streaming.read_until(b"some")
    thread, results = draining(server)
    seen = streaming.read_until(b"\r\n0\r\n\r\n")
    assert b'"code":"proxy_stopped"' in seen and b"[DONE]" not in seen and seen.endswith(b"\r\n0\r\n\r\n")
    assert whole.read_until(b"}}").startswith(b"HTTP/1.1 503 ")
    thread.join(DEADLINE)
    assert results == [False] and fake.left.wait(DEADLINE)
    streaming.leave()
    whole.leave()


@pytest.mark.skipif(os.name == "nt", reason="signals are something else there")
def test_burst_of_signals_ends_the_program():
    for _ in range(3):
        with running("--demo", "--listen", "127.0.0.1:0") as process:
            process.stderr.readline()
            for _ in range(30):
                process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) in (0, 1)


@pytest.mark.skipif(os.name == "nt", reason="signals are something else there")
def test_question_at_the_start_does_not_hold_up_the_end():
    fake = FakeOllama(HOLD)
    with running("--listen", "127.0.0.1:0", OLLAMA_HOST=fake.url) as process:
        process.stderr.readline()
        fake.requests.get(timeout=DEADLINE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
    fake.close()


def test_model_name_beyond_any_of_ollamas_is_a_400(start):
    server, fake = start()
    assert assert_failed(chat(server, model="m" * 601), 400)["param"] == "model" and fake.requests.empty()


@pytest.fixture
def uncollected():
    """What is not closed stays open: the garbage collector does not come to help."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_client_that_leaves_within_a_refusal_leaves_no_descriptor_behind(start, uncollected):
    server, fake = start(b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n{", HOLD)

    def leave(count):
        clients = [Client(server) for _ in range(count)]
        for _ in clients:
            fake.requests.get(timeout=DEADLINE)
        for client in clients:
            client.leave()
        poll(lambda: not server.connections and not server.observer.active)
    leave(1)
    before = descriptors()
    leave(40)
    poll(lambda: descriptors() <= before + 5)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat"])
def test_upstream_head_that_breaks_the_parser_is_its_own_fault_and_closed(start, log, path):
    server, fake = start(b"HTTP/1.1 200 OK\r\nContent-Type: multipart/mixed; boundary*=a; boundary*0=b\r\n\r\n", HOLD)
    assert_failed(call(server, "POST", path, {"model": "m", "messages": []}), 502, "upstream_protocol")
    assert fake.left.wait(DEADLINE) and "Traceback" not in "".join(log.queue)


def test_heartbeats_come_with_the_trace_of_a_long_request_too(start):
    more = threading.Event()
    server, _ = start(more, RECORDED["length"], heartbeat=0.01)
    client = Client(server, "/v1/chat/completions?trace=1", messages=[{"role": "user", "content": "x" * 9000}])
    seen = client.read_until(b'"delta":{}')
    assert b": POST /api/chat {" in seen and b'"role":"assistant"' in seen
    more.set()
    assert b": POST" not in client.read_until(b"[DONE]")
    client.leave()


def test_upstream_under_tls_is_spoken_to_if_its_certificate_is_good(start, log, certificate, monkeypatch):
    upstream, _ = start(RECORDED["hello"], tls_cert=certificate[0], tls_key=certificate[1])
    url = upstream.url
    server, _ = start(upstream=url)
    assert_failed(chat(server), 502, "upstream_unreachable")
    poll(lambda: any("CERTIFICATE_VERIFY_FAILED" in line for line in log.queue))
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    server, _ = start(upstream=url)
    assert chat(server).text() == chat(server, False).text() == HELLO


# ---- Shape -------------------------------------------------------------------------------------


def sent(fake):
    return json.loads(fake.requests.get(timeout=DEADLINE)[2])


def test_alias_goes_up_as_its_model_and_answers_under_its_own_name(start):
    server, fake = start(RECORDED["hello"], alias=(("gpt-4o", "hello"),))
    answer = chat(server, model="gpt-4o")
    assert {c["model"] for c in answer.chunks()} == {"gpt-4o"} and sent(fake)["model"] == "hello"
    for path in "/api/chat", "/api/show", "/v1/embeddings", "/v1/responses", "/v1/messages":
        call(server, "POST", path, {"model": "gpt-4o"})
        assert sent(fake)["model"] == "hello", path
    fake.steps = [model_list("hello:latest")]
    assert [m["id"] for m in call(server, "GET", "/v1/models").json()["data"]] == ["hello:latest", "gpt-4o"]
    assert call(server, "GET", "/v1/models/gpt-4o").json()["id"] == "gpt-4o"


def test_defaults_fill_what_the_request_leaves_open(start):
    server, fake = start(RECORDED["hello"], keep_alive="1h",
                         option=(("num_ctx", 8192), ("temperature", 0.5), ("top_k", 5)))
    chat(server, temperature=1, options={"top_k": 7})
    body = sent(fake)
    assert body["options"] == {"num_ctx": 8192, "temperature": 1, "top_k": 7}
    assert body["keep_alive"] == "1h"
    chat(server, keep_alive=0, num_ctx=1)
    body = sent(fake)
    assert body["keep_alive"] == 0 and body["options"]["num_ctx"] == 1
    for path in "/api/chat", "/api/generate", "/api/embed", "/api/embeddings":
        call(server, "POST", path, {"model": "m", "options": {"top_k": 9}})
        body = sent(fake)
        assert body["options"] == {"num_ctx": 8192, "temperature": 0.5, "top_k": 9}
        assert body["keep_alive"] == "1h"
    call(server, "POST", "/v1/responses", {"model": "m"})
    assert sent(fake) == {"model": "m"}


def test_passed_body_in_capitals_cannot_slip_past_the_alias(start):
    server, fake = start(RECORDED["version"], alias=(("a", "b"),))
    for body in {"Model": "a"}, {"model": "a", "MODEL": "c"}, {"Messages": []}, {"option\u017f": {}}:
        answer = call(server, "POST", "/api/chat", body)
        assert answer.status == 400 and fake.requests.empty()


# ---- Observe -----------------------------------------------------------------------------------


def records(log, count):
    """The next JSON lines of the log; they come just after their answers."""
    found = []
    while len(found) < count:
        line = log.get(timeout=DEADLINE)
        found += [json.loads(line)] if line[:1] == "{" else []
    return found


def test_each_request_is_one_line_that_says_what_happened(start, log):
    server, fake = start(RECORDED["hello"], api_key=(ALICE,), log="json")
    key = bearer(ALICE[1])
    answer = call(server, "POST", "/v1/chat/completions", {
        "model": "m", "messages": [{"role": "user", "content": "SECRET"}], "stream": True, "x": 1}, key)
    record = records(log, 1)[0]
    assert tuple(record) == proxy_module.RECORD_NAMES
    assert record["id"] == answer.headers["X-Request-Id"] and record["caller"] == "alice"
    assert (record["method"], record["route"], record["model"], record["status"]) == (
        "POST", "/v1/chat/completions", "m", 200)
    assert (record["prompt_tokens"], record["completion_tokens"], record["end"]) == (9, 27, "done")
    assert record["ignored"] == ["x"] and record["error"] is None and "SECRET" not in str(record)
    assert 0 < record["first_token_seconds"] <= record["seconds"] and record["tokens_per_second"] > 0
    for name, path, body, counts in [
            ("hello", "/api/chat", {"model": "m"}, (9, 27)), ("generate", "/api/generate", {}, (None, 27)),
            ("hello_whole", "/api/chat", {"stream": False}, (9, 27))]:
        fake.steps = [RECORDED[name]]
        for headers in key, {**key, **SSE}:
            call(server, "POST", path, body, headers)
            record = records(log, 1)[0]
            assert record["completion_tokens"] == counts[1] and record["end"] == "done"


@pytest.mark.parametrize("steps, end, error", [
    ((RECORDED["die_mid"],), "error", "upstream_error"), ((SAID,), "upstream cut", "upstream_cut"),
    ((RECORDED["missing"],), "error", "model_not_found")])
def test_log_says_how_a_request_failed(start, log, steps, end, error):
    server, _ = start(*steps, log="json")
    chat(server)
    record = records(log, 1)[0]
    assert (record["end"], record["error"]) == (end, error)


@pytest.mark.parametrize("headers", [{}, {"Accept": "text/event-stream"}])
@pytest.mark.parametrize("steps, end", [
    ((RECORDED["die_mid"],), "error"), ((SAID + b"0\r\n\r\n",), "upstream cut"), ((SAID,), "upstream cut"),
    ((RECORDED["hello"],), "done")])
def test_log_says_how_a_passed_answer_failed(start, log, steps, end, headers):
    server, _ = start(*steps, log="json")
    call(server, "POST", "/api/chat", {"model": "m"}, headers)
    record = records(log, 1)[0]
    assert record["end"] == end and (record["error"] is None) == (end == "done")


def test_log_and_metrics_take_odd_names_in_short_form(start, log):
    server, _ = start(RECORDED["hello"], log="json")
    chat(server, model="m" * 100_000, **{"f" * 100_000: 1})
    assert len(str(records(log, 1)[0])) < 1000
    chat(server, model="\ud800 status=200\x9b\x7f")
    line = log.get(timeout=DEADLINE)
    assert line.isascii() and line.isprintable()
    assert call(server, "POST", "/api/chat", b'{"model":"a","model":"a"}').status == 200
    assert 'model="other"' in str(metrics(server)) and len(str(metrics(server))) < 10_000
    assert proxy_module.log_line({"time": "T", "model": "m status=200"}) == 'T model="m status=200"'


def test_client_that_leaves_after_done_is_a_normal_end_and_before_it_a_hang_up(start, log):
    endless = chunk(says("x" * 1000)) * 5000
    for steps, until, end in [((RECORDED["hello"],), b"[DONE]", "done"),
                              ((HEAD, endless), b"data:", "client hang-up")]:
        server, _ = start(*steps, log="json")
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(POST + HOST + b"Content-Length: 41\r\n\r\n"
                           b'{"model":"m","messages":[],"stream":true}')
            seen = b""
            while until not in seen:
                seen += client.recv(100)
            reset_on_close(client)
        assert records(log, 1)[0]["end"] == end


def test_text_log_is_one_line_without_control_characters(start, log):
    server, _ = start(RECORDED["missing"])
    chat(server, model="a\x1b[2J\nb\u2028", stream=False)
    text = log.get(timeout=DEADLINE)
    assert len(text.splitlines()) == 1 and "\x1b" not in text
    assert 'model="a\\u001b[2J\\nb\\u2028"' in text and "status=404" in text and "end=error" in text


def metrics(server):
    """The samples of /metrics, once no other request is under way."""
    end = time.monotonic() + DEADLINE
    while True:
        answer = call(server, "GET", "/metrics")
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        samples = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines()
                       if not line.startswith("#"))
        if samples["ndjson_sse_proxy_active_requests"] == "1" or time.monotonic() > end:
            return {name[len("ndjson_sse_proxy_"):]: float(value) for name, value in samples.items()}


def test_metrics_count_requests_tokens_times_and_failures(start):
    server, fake = start(RECORDED["hello"])
    chat(server)
    fake.steps = [SAID]
    chat(server, model='quo"te')
    chat(server, stream=False)
    call(server, "GET", "/nosuch")
    found = metrics(server)
    assert found['requests_total{route="/v1/chat/completions",status="200"}'] == 2
    assert found['requests_total{route="/v1/chat/completions",status="502"}'] == 1
    assert found['requests_total{route="none",status="404"}'] == 1
    assert found['tokens_total{model="m",kind="prompt"}'] == 9
    assert found['tokens_total{model="m",kind="completion"}'] == 27
    assert found['upstream_errors_total{kind="cut"}'] == 2 and found["client_hangups_total"] == 0
    assert found['first_token_seconds_bucket{le="+Inf"}'] == found["first_token_seconds_count"] == 3
    assert found["request_seconds_count"] >= 4


def test_metrics_cannot_be_grown_by_inventing_models_and_paths(start):
    server, fake = start(RECORDED["missing"])
    for i in range(20):
        chat(server, model=f"invented-{i}")
        call(server, "GET", f"/invented-{i}")
        call(server, "POST", f"/api/experimental/invented-{i}")
        call(server, f"BREW{i}", "/healthz")
    assert "invented" not in str(metrics(server)) and "BREW" not in str(metrics(server))
    observer = proxy_module.Observer("text", None)
    record = {**dict.fromkeys(proxy_module.RECORD_NAMES), "time": "", "completion_tokens": 1}
    for i in [*range(102), 99]:
        observer.observe({**record, "model": f"m{i}"})
    counted = re.findall('model="(.*)",kind="completion"} (.*)', observer.metrics())
    assert counted[-3:] == [("m98", "1"), ("m99", "2"), ("other", "2")]


# ---- Hooks -------------------------------------------------------------------------------------


@pytest.fixture
def hooks(tmp_path):
    """hooks(source) -> the path of a file with it."""
    def write(source):
        path = tmp_path / "hooks.py"
        path.write_text(source, encoding="utf-8")
        return str(path)
    return write


def test_authenticate_hook_names_the_caller_or_refuses(start, hooks, log):
    server, _ = start(model_list("m"), log="json", hooks=hooks("""
def authenticate(headers):
    if headers.get("X-Token") != "let me in":
        raise PermissionError("no token")
    return "carol"
"""))
    answer = call(server, "GET", "/v1/models")
    assert answer.status == 401 and answer.json()["error"]["message"] == "no token"
    assert call(server, "GET", "/v1/models", headers={"X-Token": "let me in"}).status == 200
    assert {r["caller"] for r in records(log, 2)} == {None, "carol"}


def test_shape_hook_changes_the_body_on_every_route_or_refuses_with_a_status(start, hooks):
    server, fake = start(RECORDED["hello"], hooks=hooks("""
from ndjson_sse_proxy import ProxyError

def shape(route, body, caller):
    if body.get("model") == "big":
        raise ProxyError(429, "not today", code="limit", headers=[("Retry-After", "60")])
    return {**body, "model": "small", "seed": len(route)}
"""))
    chat(server)
    assert sent(fake)["model"] == "small"
    call(server, "POST", "/api/chat", {"model": "m"})
    assert sent(fake) == {"model": "small", "seed": 9}
    for path in "/v1/chat/completions", "/api/chat", "/v1/responses":
        answer = call(server, "POST", path, {"model": "big", "messages": []})
        assert (answer.status, answer.headers["Retry-After"]) == (429, "60")
        assert answer.json()["error"]["type"] == "rate_limit_error" and fake.requests.empty()
    assert call(server, "POST", "/api/chat", b"not json").status == 400


@pytest.mark.parametrize("source", [
    "def authenticate(headers): open('/nonexistent')", "def shape(route, body, caller): exit(3)",
    "def shape(route, body, caller): return shape(route, body, caller)",
    "import errno\ndef authenticate(headers): raise PermissionError(errno.EACCES, 'x', '/secret')",
    "def authenticate(headers): 1 / 0", "def authenticate(headers): pass", "def shape(route, body, caller): return body['nosuch']",
    "def shape(route, body, caller): return 5"])
def test_hook_that_breaks_fails_closed_and_is_logged(start, hooks, log, source):
    server, fake = start(RECORDED["hello"], hooks=hooks(source))
    assert chat(server).status == 500 and fake.requests.empty()
    assert "Traceback" in "\n".join(log.queue)
    assert call(server, "GET", "/healthz").status == 200


def test_hook_file_without_a_hook_is_refused_at_the_start(start, hooks):
    with pytest.raises(ValueError, match="none of authenticate"):
        start(hooks=hooks("def shpe(route, body, caller): return body"))


def test_shape_hook_may_refuse_audio_although_it_sees_no_body(start, hooks):
    server, fake = start(RECORDED["version"], hooks=hooks("""
from ndjson_sse_proxy import ProxyError

def shape(route, body, caller):
    if body.get("model") != "mine":
        raise ProxyError(403, "not yours")
"""))
    assert call(server, "POST", "/v1/audio/transcriptions", b"RIFF").status == 403
    assert fake.requests.empty()


def test_key_file_may_have_windows_line_ends_and_mark_and_names_the_line_of_a_mistake(start, tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbf    # who is who\r\n    alice:sk-alice-0123\r\n\r\n")
    server, _ = start(model_list("m"), api_key_file=str(path))
    assert call(server, "GET", "/v1/models", headers=bearer("sk-alice-0123")).status == 200
    path.write_text("sk-bob-01234567\nalice: sk-alice-0123\n")
    with pytest.raises(ValueError, match="line 2"):
        start(api_key_file=str(path))


def test_observe_hook_gets_the_record_and_may_break_without_harm(start, hooks, tmp_path, log):
    server, _ = start(RECORDED["hello"], log="json", hooks=hooks(f"""
def observe(record):
    with open({str(tmp_path / "seen")!r}, "a") as file:
        print(record["model"], record["completion_tokens"], file=file)
    1 / 0
"""))
    assert chat(server).events()[-1] == "[DONE]"
    assert chat(server).events()[-1] == "[DONE]"
    poll(lambda: sum("ZeroDivisionError" in text for text in log.queue) >= 2)
    assert (tmp_path / "seen").read_text() == "m 27\nm 27\n"


# ---- Faults ------------------------------------------------------------------------------------
# (1) the key file


def test_slower_reader_of_the_key_file_cannot_bring_an_older_version_back(tmp_path, monkeypatch, log):
    path, parse = tmp_path / "keys", proxy_module.parse_key
    write_keys(path, "sk-alice-0123\n")
    keys, reading, go_on = proxy_module.Keys([], str(path)), threading.Event(), threading.Event()

    def parse_slowly(line):
        if threading.current_thread() is slow:
            reading.set()
            go_on.wait(DEADLINE)
        return parse(line)
    monkeypatch.setattr(proxy_module, "parse_key", parse_slowly)
    slow = threading.Thread(target=keys.owner, args=["sk-alice-0123"], daemon=True)
    fast = threading.Thread(target=keys.owner, args=["sk-alice-0123"], daemon=True)
    write_keys(path, "sk-alice-0123\nsk-carol-0123\n")
    slow.start()
    assert reading.wait(DEADLINE)
    write_keys(path, "sk-bob-01234567\n")  # revokes the key while the slow one has just read it
    fast.start()
    fast.join(0.2)  # it may wait for the slow one, or overtake it
    go_on.set()
    slow.join(DEADLINE)
    fast.join(DEADLINE)
    assert keys.owner("sk-alice-0123") is None and keys.owner("sk-bob-01234567") == "key-1"


def test_empty_key_file_lets_nobody_in_unless_it_is_young_and_so_being_written(tmp_path, log):
    path = tmp_path / "keys"
    write_keys(path, "sk-bob-01234567\n")
    keys = proxy_module.Keys([], str(path))
    path.write_text("")
    assert keys.owner("sk-bob-01234567") == "key-1" and keys.owner("sk-bob-01234567") == "key-1"
    assert ["still being written" in line for line in log.queue] == [True]
    os.utime(str(path), (time.time() - 3,) * 2)
    assert keys.owner("sk-bob-01234567") is None


def test_young_key_file_is_read_again_although_its_size_and_times_are_the_same(tmp_path, monkeypatch):
    path, same = tmp_path / "keys", os.stat(str(tmp_path))
    path.write_text("sk-alice-0123\n")
    monkeypatch.setattr(proxy_module.os, "stat", lambda _: mock.Mock(
        st_mode=0o100600, st_size=14, st_ino=1, st_ctime_ns=1, st_mtime_ns=1, st_mtime=same.st_mtime))
    monkeypatch.setattr(proxy_module.time, "time", lambda: same.st_mtime + 1)
    keys = proxy_module.Keys([], str(path))
    path.write_text("sk-carol-0123\n")
    assert keys.owner("sk-alice-0123") is None and keys.owner("sk-carol-0123") == "key-1"


@pytest.mark.parametrize("kind", ["old and empty", "young and empty", "comment", "FIFO", "directory"])
def test_key_file_without_keys_is_a_mistake_at_the_start(tmp_path, kind):
    path = tmp_path / "keys"
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(str(path))
    else:
        path.write_text("# none yet\n" if kind == "comment" else "")
        os.utime(str(path), (time.time() - 9 * (kind[0] == "o"),) * 2)
    with running("--demo", "--listen", "127.0.0.1:0", "--api-key-file", str(path)) as process:
        output = process.stderr.read()
        assert process.wait(DEADLINE) == 2
    assert len(output.splitlines()) == 1 and str(path) in output


def test_key_that_is_given_twice_hides_no_key_in_the_file(tmp_path):
    write_keys(tmp_path / "keys", "alice:sk-alice-0123\n")
    assert proxy_module.Keys([ALICE], str(tmp_path / "keys")).owner(ALICE[1]) == "alice"
    assert proxy_module.Keys([BOB, BOB], str(tmp_path / "keys")).owner(ALICE[1]) == "alice"


# (2) chunked request bodies

CODED = b"Transfer-Encoding: chunked\r\n"
NEXT = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
END = b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("form", [b"%x\r\n%b\r\n", b"%X\r\n%b\r\n", b"%08x\r\n%b\r\n"])
def test_body_in_chunks_is_read_and_the_next_request_is_answered(start, form, size):
    server, fake = start(RECORDED["length"])
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "é🙂" * 50}]},
                      ensure_ascii=False).encode()
    chunks = [form % (len(body[i:i + size]), body[i:i + size]) for i in range(0, len(body), size)]
    client = Client(server, path=None)
    client.socket.sendall(POST + HOST + CODED + b"\r\n")
    for piece in chunks + [END]:
        client.socket.sendall(piece)
    client.socket.sendall(NEXT)
    answer = client.read_until(b"ok\n")
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b"HTTP/1.1 200 ") == 2
    assert sent(fake)["messages"] == json.loads(body)["messages"]
    client.leave()


@pytest.mark.parametrize("head, body, status", [
    *[(CODED, body, 400) for body in (
        b"2;x=y\r\n{}\r\n" + END, b"2\r\n{}\r\n0\r\nX: y\r\n\r\n", b"+2\r\n{}\r\n" + END,
        b"-2\r\n{}\r\n" + END, b"0x2\r\n{}\r\n" + END, b"0_2\r\n{}\r\n" + END,
        b"000000002\r\n{}\r\n" + END, b"2\r\n{}0\r\n\r\n", b"2\r\n{}\n0\r\n\r\n", b" 2\r\n{}\r\n" + END,
        b"2 \r\n{}\r\n" + END, b"2\t\r\n{}\r\n" + END, b"2\n{}\n0\n\n", b"\r\n{}\r\n" + END,
        b"g\r\n", b"\xef\xbc\x92\r\n{}\r\n" + END, b"1\r\n{}\r\n" + END, b"2\r\n{}\r\n0\n\n",
        b"2\r\n{}\r\n0;\r\n\r\n", b"2\r{}\r0\r\r")],
    (CODED * 2, chunk(b"{}") + END, 400), (CODED + LENGTH, chunk(b"{}") + END, 400),
    *[(b"Transfer-Encoding: %b\r\n" % coding, chunk(b"{}") + END, 400) for coding in (
        b"gzip, chunked", b"chunked, chunked", b"identity", b"xchunked", b"chunked;q=1", b"", b"\x0bchunked")],
    (b"Transfer-Encoding : chunked\r\n", chunk(b"{}") + END, 400), (b"", b"{}", 411),
    (CODED, b"65\r\n" + b"x" * 0x65 + b"\r\n" + END, 413), (CODED, b"FFFFFFFF\r\n", 413),
    (CODED, chunk(b"x" * 60) * 2 + END, 413), (b"Content-Length: 101\r\n", b"x" * 101, 413)])
def test_body_in_malformed_chunks_is_refused_and_what_follows_is_no_request(
        start, monkeypatch, head, body, status):
    monkeypatch.setattr(proxy_module, "MAX_BODY_BYTES", 100)
    server, fake = start()
    answer = raw(server, POST + HOST + head + b"\r\n" + body + NEXT)
    assert answer.startswith(b"HTTP/1.1 %d " % status) and answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer and b'{"error":{' in answer and fake.requests.empty()
    answer = raw(server, POST.replace(b"1.1", b"1.0") + HOST + CODED + b"\r\n" + chunk(b"{}") + END + NEXT)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("body", [b"", b"2", b"2\r\n", b"2\r\n{", b"2\r\n{}\r\n", b"2\r\n{}\r\n0\r\n"])
def test_body_in_chunks_that_stops_early_is_never_used(start, body):
    server, fake = start(RECORDED["length"])
    answer = raw(server, b"POST /api/show HTTP/1.1\r\n" + HOST + CODED + b"\r\n" + body)
    assert answer[:13] in (b"", b"HTTP/1.1 400 ") and fake.requests.empty()


@pytest.mark.parametrize("body", [b"1\r\nx\r\n" * 2000, b"ffff\r\n" + b"x" * 9999])
def test_body_in_chunks_that_drip_is_a_408_when_its_time_is_up(start, monkeypatch, body):
    monkeypatch.setattr(proxy_module, "BODY_SECONDS", 0.2)
    server, _ = start()
    client = Client(server, path=None)
    client.socket.sendall(POST + HOST + CODED + b"\r\n")
    assert drip(client, body).startswith(b"HTTP/1.1 408 ")
    client.leave()


def test_deadline_holds_although_bytes_are_there_each_time_it_looks():
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"x")
        with pytest.raises(ProxyError, match="in time"):
            proxy_module.DeadlineReader(here).read(1)  # its deadline has long passed


@pytest.mark.parametrize("head, body", [(LENGTH, BODY), (CODED, chunk(BODY) + END)])
def test_client_that_waits_with_its_body_is_told_to_go_on(start, head, body):
    server, _ = start(RECORDED["length"])
    client = Client(server, path=None)
    client.socket.sendall(POST + HOST + head + b"Expect: 100-continue\r\n\r\n")
    assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.socket.sendall(body)
    assert client.read_until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    client.leave()
    refused = raw(server, b"POST /v1/x HTTP/1.1\r\n" + HOST + head + b"Expect: 100-continue\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 404 ")


# (3) errors in hooks, (6) forged log lines


@pytest.mark.parametrize("hook", ["authenticate(headers)", "shape(route, body, caller)"])
@pytest.mark.parametrize("raised", [
    "ProxyError(429, 'x', headers={'Retry-After': '1'})", "ProxyError(429, 'x', headers=['Retry-After: 1'])",
    "ProxyError(429, 'x', headers=[('X', '\u20ac')])", "ProxyError(429, 'x', headers=[('X', float('nan'))])",
    "ProxyError(429, 'x', headers=[('X', 'a\\r\\nY: b')])", "ProxyError(429, 'x', headers=[('X:', 'a')])",
    "ProxyError(429, 'x', headers=5)", "ProxyError(99, 'x')", "ProxyError(200, 'x')", "ProxyError(True, 'x')",
    "ProxyError('429', 'x')", "ProxyError(float('nan'), 'x')", "ProxyError(429, float('nan'))",
    "ProxyError(429, 'x', code=float('nan'))", "ProxyError(429, 'x', param={1})", "ProxyError()", "Late()",
    "Empty()", "SystemExit(3)", "KeyboardInterrupt()", "GeneratorExit()", "StopIteration()",
    "socket.timeout('x')", "ConnectionResetError('x')", "BrokenPipeError(32, 'x')", "MemoryError()"])
def test_hook_that_raises_what_cannot_be_sent_is_a_500_that_is_logged_and_counted(
        start, hooks, log, hook, raised):
    server, fake = start(RECORDED["hello"], log="json", hooks=hooks(f"""
import socket
from ndjson_sse_proxy import ProxyError

class Empty(ProxyError):
    def __init__(self): pass

def Late():
    error = ProxyError(429, "x")
    error.headers = [("X", "\u20ac")]
    return error

def {hook}:
    raise {raised}
""".encode("ascii", "backslashreplace").decode()))
    answer = raw(server, POST + HOST + LENGTH + b"\r\n" + BODY)
    assert answer.startswith(b"HTTP/1.1 500 ") and b'"type":"server_error"' in answer and fake.requests.empty()
    lines = [log.get(timeout=DEADLINE)]
    while lines[-1][:1] != "{":
        lines.append(log.get(timeout=DEADLINE))
    assert "Traceback" in "".join(lines) and json.loads(lines[-1])["end"] == "error"
    poll(lambda: not server.observer.active)
    assert 'route="/v1/chat/completions",status="500"} 1' in server.observer.metrics()


def test_traceback_cannot_forge_a_line_of_the_log(start, hooks, log):
    forged = "2026-11-25T00:00:00Z status=200 end=done"
    server, _ = start(log="json", hooks=hooks(
        "def authenticate(headers): raise ValueError(bytes.fromhex(headers['X']).decode())"))
    text = "".join(end + forged for end in ("\n", "\r", "\r\n", "\x85", "\u2028", "\x0b", "\x1b[2J"))
    assert call(server, "GET", "/v1/models", headers={"X": text.encode().hex()}).status == 500
    poll(lambda: any(line[0] == "{" for line in log.queue))
    lines = [line for line in log.queue if line[0] != "{"]
    assert sum(forged in line for line in lines) > 3
    assert all(line.startswith("    ") and line.isascii() and line.isprintable() for line in lines)


# (4) unread stderr


@pytest.mark.skipif(os.name == "nt", reason="signals are something else there")
def test_stderr_that_nobody_reads_stops_neither_answers_nor_the_end():
    fake = FakeOllama(RECORDED["missing"])
    with running("--listen", "127.0.0.1:0", OLLAMA_HOST=fake.url) as process:
        port = int(re.search(r":(\d+) ", process.stderr.readline())[1])
        server = mock.Mock(server_port=port)
        fields = {f"{i:02d}" + "x" * 90: 1 for i in range(20)}  # a line of the log names them all
        for _ in range(150):  # 285 KB
            assert chat(server, **fields).status == 404
        fake.steps = [SAID, HOLD]
        client = Client(server)
        client.read_until(b"data: ")
        process.send_signal(signal.SIGTERM)
        poll(lambda: socket.socket().connect_ex(("127.0.0.1", port)))  # until it is draining
        assert process.poll() is None
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 1 and time.monotonic() - begun < 2
        client.leave()
    fake.close()


# (5) HTTP/1.0


@pytest.mark.parametrize("path, steps, whole", [
    ("/api/chat", (SAID + chunk(FINAL) + END,), True), ("/api/version", (RECORDED["version"],), True),
    ("/api/chat", (RECORDED["missing"],), True), ("/api/chat", (SAID,), False),
    ("/api/chat", (SAID + END,), False), ("/api/chat", (SAID, RESET), False),
    ("/api/chat", (SAID + b"zz\r\n",), False), ("/api/chat", (SAID, HOLD), False)])
def test_http_1_0_answer_ends_its_connection_and_in_a_reset_if_it_was_cut(start, path, steps, whole):
    server, _ = start(*steps, idle_timeout=0.3)
    client = Client(server, path=None)
    method = b"GET" if path == "/api/version" else b"POST"
    client.socket.sendall(b"%b %b HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n%b" % (
        method, path.encode(), 2 * (method == b"POST"), b"{}"[:2 * (method == b"POST")]))
    with contextlib.nullcontext() if whole else pytest.raises(ConnectionResetError):
        answer = client.read_until(b"never")
        assert b"\r\nConnection: close\r\n" in answer and b"Transfer-Encoding" not in answer
    client.leave()


# (7) out of descriptors, (8) counts


@pytest.mark.parametrize("number", [errno_ for errno_ in (24, 23)])  # EMFILE, ENFILE
def test_lack_of_descriptors_is_a_503_to_try_again(start, monkeypatch, log, number):
    def connect(self):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    server, _ = start()
    for path in b"/v1/chat/completions", b"/api/chat":
        answer = raw(server, b"POST %b HTTP/1.1\r\n" % path + HOST + LENGTH + b"\r\n" + BODY)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: " in answer
        assert b"reach Ollama" not in answer


@pytest.mark.parametrize("count", ["true", "-5", "1.5", '"5"', "[]", "1e3"])
def test_count_that_is_no_count_is_an_error_and_in_a_passed_answer_unknown(start, log, count):
    final = FINAL.replace(b'"done":true', b'"done":true,"prompt_eval_count":1,"eval_count":%b' % count.encode())
    server, _ = start(HEAD + chunk(final) + END, log="json")
    for stream in True, False:
        assert_failed(chat(server, stream), 502, "upstream_protocol")
        assert records(log, 1)[0]["completion_tokens"] is None
    assert not call(server, "POST", "/api/chat", {"model": "m"}).cut
    record = records(log, 1)[0]
    assert (record["prompt_tokens"], record["completion_tokens"], record["end"]) == (1, None, "done")


# (9) end marks

TOLD = b'event: message_delta\ndata: {"type":"message_delta","delta":{"text":"data: [DONE]"}}\n\n'
LONG = json.dumps({"text": "x" * (1 << 20)}).encode()
ARGUMENTS = json.dumps({"message": {"tool_calls": [{"function": {"name": "f", "arguments": {
    "done": True, "x": '"done":true}\n', "error": "no"}}}]}, "done": False}).encode() + b"\n"
CONTEXT = json.dumps({"done": True, "context": list(range(5000)), "eval_count": 7}).encode() + b"\n"
DEAD = (b'data: {"id":"chatcmpl-477","choices":[{"index":0,"delta":{"content":"v"},"finish_reason":null}]}\n\n'
        b'data: {"id":"chatcmpl-477","choices":[{"index":0,"delta":{"content":""},"finish_reason":null}]}\n\n')
LINES, EVENTS, DIED = "application/x-ndjson", "text/event-stream", "upstream cut"


def event(name, data=b"{}"):
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("path, kind, body, end", [
    *[(path, LINES, body, end) for path in ("/api/chat", "/api/generate") for body, end in [
        (says("a") + FINAL, "done"), (says("a") + FINAL.strip(), "done"), (says("a"), DIED),
        (says("a") + FINAL[:-5], DIED), (ARGUMENTS, DIED), (ARGUMENTS + FINAL, "done"),
        (says("a") + CONTEXT, "done"), (says("a") + CONTEXT[:-9], DIED), (says('"done":true}\n'), DIED),
        (b'{"done":"true"}\n', DIED), (b'{"x":{"done":true}}\n', DIED), (b'[{"done":true}]\n', DIED),
        (says("a") + b'{"error":"died"}\n', "error"), (says('{"error":"x"}') + FINAL, "done"),
        (says("a") + FINAL.replace(b"\n", b"\r\n"), "done"), (b'{"done": true, "x": %b}\n' % LONG, "done")]],
    ("/api/chat", LINES + "; charset=utf-8", says("a"), DIED),
    ("/api/chat", "Application/X-NDJSON;a=b", says("a") + FINAL, "done"),
    *[("/v1/messages", EVENTS, body, end) for body, end in [
        (TOLD + event("message_stop"), "done"), (TOLD, DIED), (TOLD + event("message_stop", LONG), "done"),
        (TOLD + event("message_stop", LONG)[:-9], DIED), (TOLD + event("message_stop")[:-1], DIED),
        (TOLD + event("message_stop").replace(b"\n", b"\r\n"), "done"), (TOLD + event("message_stopped"), DIED),
        (TOLD + event("error"), "error"), (event("x", b"event: message_stop"), DIED)]],
    *[("/v1/responses", EVENTS, TOLD + event("response." + name, LONG), end) for name, end in [
        ("completed", "done"), ("incomplete", "done"), ("failed", "error"), ("created", DIED)]],
    ("/v1/responses", EVENTS, event("response.completed", b"{}\ndata: {}"), "done"),
    *[("/v1/completions", kind, body, end) for kind in (EVENTS, EVENTS + "; charset=utf-8", "TEXT/Event-Stream ;x")
      for body, end in [(DEAD, DIED), (DEAD + b"data: [DONE]\n\n", "done"), (DEAD + b"data: [DONE]\n", DIED),
                        (DEAD + b"data: [DONE]", DIED), (DEAD + b'data: "[DONE]"\n\n', DIED)]],
    *[(path, "application/json; charset=utf-8", b'{"done":false}', "done") for path in (
        "/api/chat", "/v1/messages", "/v1/completions")],
    ("/v1/audio/transcriptions", "text/plain", b"hello", "done")])
def test_passed_stream_is_complete_only_with_its_end_mark(start, log, size, path, kind, body, end):
    head = HEAD.replace(LINES.encode(), kind.encode())
    size = size and (1 if len(body) < 1 << 16 else 9999)
    server, _ = start(head + chunk(body) + END, size=size, log="json")
    answer = call(server, "POST", path, {"model": "m"})
    assert (answer.status, answer.body, answer.cut) == (200, body, end == DIED)
    record = records(log, 1)[0]
    assert record["end"] == end and (record["error"] is None) == (end == "done")
    assert record["completion_tokens"] == (7 if CONTEXT in body else None)


@pytest.mark.parametrize("path, kind", [
    ("/v1/audio/transcriptions", "text/plain"), ("/v1/audio/transcriptions", "application/json"),
    ("/v1/messages", EVENTS), ("/api/chat", LINES)])
@pytest.mark.parametrize("length", [b"Transfer-Encoding: chunked", b"Content-Length: 0"])
def test_passed_answer_that_is_empty_is_a_cut(start, log, path, kind, length):
    head = HEAD.replace(LINES.encode(), kind.encode()).replace(b"Transfer-Encoding: chunked", length)
    server, _ = start(head + END * (length[0] == ord("T")), log="json")
    assert_failed(call(server, "POST", path, b"{}"), 502, "upstream_cut")
    assert records(log, 1)[0]["end"] == DIED


# (10) "$ref": "#", (11) advice


def references(value):
    """All references in some JSON."""
    if isinstance(value, dict):
        return [v for k, v in value.items() if k == "$ref" and isinstance(v, str)] + references(list(value.values()))
    return [v for item in value for v in references(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("schema", [
    {"type": "object", "properties": {"child": {"$ref": "#"}}},
    {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}},
    *[{"type": "object", "properties": {name: {"$ref": "#"}}} for name in (
        "default", "const", "enum", "examples", "$ref", "properties")],
    {"$defs": {"default": {"items": {"$ref": "#"}}}, "properties": {"a": {"$ref": "#/$defs/default"}}}])
def test_reference_to_the_whole_schema_goes_up_as_one_to_its_new_place(schema):
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in "fg"]
    formats = [native(tools=tools[:1], tool_choice=named("f")), native(tools=tools, tool_choice="required"),
               native(tools=tools, tool_choice=named("g")), native(response_format={
                   "type": "json_schema", "json_schema": {"name": "n", "schema": schema}})]
    for found in (body["format"] for body in formats):
        assert references(found) and "#" not in references(found)
        for reference in references(found):
            place = found
            for step in reference[2:].split("/"):
                place = place[step]  # it points at something
            assert isinstance(place, dict)


@pytest.mark.parametrize("text", ["unsupported $ref #", "failed to parse grammar", "invalid JSON schema in format"])
@pytest.mark.parametrize("fields, param", [
    ({"tools": [function()], "tool_choice": "required"}, "tools"),
    ({"tools": [function()], "tool_choice": named("f")}, "tools"), ({"format": {"type": "object"}}, "format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}, "response_format")])
def test_schema_that_ollama_refuses_is_a_400_that_names_what_was_sent(start, text, fields, param):
    server, fake = start(json_answer({"error": text}, 500))
    for steps in fake.steps, [HEAD + chunk(json.dumps({"error": text}).encode() + b"\n") + END]:
        fake.steps = steps
        for stream in True, False:
            error = assert_failed(chat(server, stream, **fields), 400)
            assert error["param"] in (param, "tool_choice"[:99 * (param == "tools")]) and param in error["message"]


@pytest.mark.parametrize("fields, longer", [
    ({}, True), ({"num_ctx": 4096}, True), ({"num_ctx": 4097}, False), ({"options": {"num_ctx": 8192}}, False)])
def test_advice_to_raise_num_ctx_only_while_that_can_help(start, fields, longer):
    server, _ = start(RECORDED["over_trunc_false"])
    message = assert_failed(chat(server, **fields), 400, "context_length_exceeded")["message"]
    assert ("set options.num_ctx" in message and "--option num_ctx=" in message) == longer, message


# (12) times, (14) trace, (15) OpenAI's errors, (16) command line


@pytest.mark.parametrize("path, answer, stream", [
    ("/api/chat", RECORDED["hello_whole"], False), ("/api/chat", RECORDED["hello"], True),
    ("/v1/messages", json_answer({"usage": {"input_tokens": 1, "output_tokens": 27}}), False)])
def test_passed_answer_has_a_rate_and_a_first_token_only_if_it_streams(start, log, path, answer, stream):
    server, _ = start(answer, log="json")
    call(server, "POST", path, {"model": "m"})
    record = records(log, 1)[0]
    assert record["completion_tokens"] == 27
    assert (record["first_token_seconds"] is not None) == (record["tokens_per_second"] is not None) == stream


@pytest.mark.parametrize("path, head", [("/api/chat", HEAD), ("/v1/messages", HEAD.replace(
    LINES.encode(), EVENTS.encode()))])
def test_passed_stream_that_the_client_leaves_keeps_its_time_to_the_first_token(start, log, path, head):
    server, _ = start(head + chunk(says("a")), HOLD, log="json")
    client = Client(server, path)
    client.read_until(b"false}")
    client.leave()
    record = records(log, 1)[0]
    assert record["end"] == "client hang-up" and record["first_token_seconds"] is not None


def test_trace_keeps_what_a_hook_adds_to_itself(start, hooks):
    server, _ = start(RECORDED["hello"], hooks=hooks(
        "def shape(route, body, caller): return {**body, 'messages': [{'role': 'system', 'content': 'PRIVATE'}]}"))
    answer = call(server, "POST", "/v1/chat/completions?trace=1", {"model": "m", "messages": [], "stream": True})
    assert b"PRIVATE" not in answer.body and b": POST" not in answer.body and b": {" in answer.body


@pytest.mark.parametrize("refusal, status, text", [
    (json_answer({"error": "not here"}, 404), 404, "not here"), (RECORDED["notfound"], None, "404 page not found"),
    (json_answer({"error": {"message": "bad", "type": "x"}}, 400), 400, "bad"),
    (json_answer({"error": {}}, 500), 500, ""), (json_answer({"type": "error", "error": {"message": "no"}}, 429), 429, "no"),
    (b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n", None, "")])
def test_error_of_any_form_is_openais_on_its_routes(start, refusal, status, text):
    server, _ = start(refusal)
    for path in "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions":
        answer = call(server, "POST", path, {"model": "m"})
        assert answer.status >= 400 and text in assert_failed(answer, status or answer.status)["message"]


def test_route_that_the_demo_lacks_is_openais_error(demo):
    for path in "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/audio/transcriptions":
        assert_failed(call(demo, "POST", path, {"model": "demo-text"}), 404)
    for method, path in ("GET", "/v1/models/nosuch"), ("GET", "/v1/nosuch"), ("POST", "/v1/batches"):
        assert_failed(call(demo, method, path, {} if method == "POST" else None), 404)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_start_line_shows_an_address_that_works(listen):
    if listen[0] == "[":
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            listen = listen + "!"
        if listen[-1] != "!":
            pytest.skip("no IPv6 here")
    with running("--demo", "--listen", listen.rstrip("!"), "--insecure") as process:
        url = parse_url(re.search(r"listening on (\S+)", process.stderr.readline())[1])
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=DEADLINE)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200 and url.hostname in ("127.0.0.1", "::1")
        connection.close()


# ---- Trace and page ----------------------------------------------------------------------------


def blocks(answer):
    """What stands between the blank lines of an event stream."""
    assert answer.status == 200 and answer.body.endswith(b"\n\n")
    return answer.body.decode().split("\n\n")[:-1]


@pytest.mark.parametrize("path, name, native", [
    ("/v1/chat/completions", "hello", "/api/chat"), ("/v1/chat/completions", "parallel", "/api/chat")])
@pytest.mark.parametrize("size", [None, 1, 700])
def test_trace_shows_the_request_and_each_line_before_the_frames_it_became(start, path, name, native, size):
    server, fake = start(RECORDED[name], size=size)
    body = {"model": "m", "messages": [], "prompt": "x", "stream": True, "max_tokens": 7}
    plain, traced = call(server, "POST", path, body), call(server, "POST", path + "?trace=1", body)
    fake.requests.get(timeout=DEADLINE)
    sent = fake.requests.get(timeout=DEADLINE)[2].decode()
    assert '"num_predict":7' in sent and blocks(traced)[0] == f": POST {native} {sent}"
    comments = [block[2:] for block in blocks(traced)[1:] if block.startswith(": ")]
    assert comments == re.findall(r"^\{.*$", RECORDED[name].decode(), re.MULTILINE)
    frames = [[re.sub('"(id|created)":.*?,"', "", frame) for frame in blocks(answer) if frame[0] != ":"]
              for answer in (plain, traced)]
    assert frames[0] == frames[1]
    line, seen = {}, 0
    for block in blocks(traced)[1:-1]:
        if block[0] == ":":
            line = json.loads(block[2:])
        elif path == "/v1/chat/completions" and '"delta":{"content"' in block:
            assert json.loads(block[6:])["choices"][0]["delta"]["content"] == line["message"]["content"]
            seen += 1
    assert seen > 0 or path == "/v1/completions"


def test_trace_shows_the_error_line_before_the_error_frame(start):
    server, _ = start(RECORDED["die_mid"])
    answer = call(server, "POST", "/v1/chat/completions?trace=1", {"model": "m", "messages": [], "stream": True})
    assert blocks(answer)[-2].startswith(': {"error":"an error') and blocks(answer)[-1].startswith('data: {"error":')


def test_trace_changes_neither_early_statuses_nor_whole_answers_nor_who_may_call(start):
    server, fake = start(RECORDED["missing"], api_key=(ALICE,))
    path, body, key = "/v1/chat/completions?trace=1", {"model": "m", "messages": []}, bearer(ALICE[1])
    assert call(server, "POST", path, {**body, "stream": True}).status == 401
    assert_failed(call(server, "POST", path, {**body, "stream": True}, key), 404, "model_not_found")
    fake.steps = [RECORDED["hello"]]
    assert call(server, "POST", path, body, key).text() == HELLO


def test_trace_of_a_request_sent_anew_shows_both(start):
    server, _ = start(answers=[[RECORDED["think_on_hello"]], [RECORDED["length"]]])
    answer = call(server, "POST", "/v1/chat/completions?trace=1", {
        "model": "m", "messages": [], "stream": True, "reasoning_effort": "high"})
    requests = [block for block in blocks(answer) if block.startswith(": POST ")]
    assert ['"think":"high"' in request for request in requests] == [True, False]


def test_trace_of_a_line_with_a_bare_carriage_return_stays_a_comment(start):
    server, _ = start(HEAD + chunk(b'{"message":{"content":"x"},\rdata: "y",\r"done":false}\n'.replace(
        b'data: "y",\r', b'"data":1,\r')) + chunk(FINAL) + b"0\r\n\r\n")
    answer = call(server, "POST", "/v1/chat/completions?trace=1", {"model": "m", "messages": [], "stream": True})
    assert ': {"message":{"content":"x"},\n: "data":1,\n: "done":false}' in blocks(answer)


@pytest.mark.parametrize("path", ["/v1/chat/completions?trace=1", "/api/chat"])
def test_line_ends_of_unicode_in_the_raw_text_are_escaped(start, path):
    text = 'a\x85data: [DONE]\u2028b\u2029c'
    line = json.dumps({"message": {"content": text}}, ensure_ascii=False).encode() + b"\n"
    server, _ = start(HEAD + chunk(line) + chunk(FINAL) + b"0\r\n\r\n")
    answer = call(server, "POST", path, {"model": "m", "messages": [], "stream": True}, SSE)
    assert answer.body.decode().splitlines() == answer.body.decode().split("\n")[:-1]
    found = [json.loads(t) for t in re.findall(r"^(?:data|): (\{.*)$", answer.body.decode(), re.MULTILINE)]
    assert {"message": {"content": text}} in found


@pytest.mark.parametrize("content_type", ["text/html", "\x01"])
def test_what_an_upstream_says_is_html_does_not_run_as_ours(start, content_type):
    server, _ = start(f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: 9\r\n\r\n<script>".encode() + b">")
    answer = call(server, "GET", "/api/version")
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and "\x01" not in answer.headers["Content-Type"]
    assert answer.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"


def test_browser_gets_the_page_which_may_load_nothing_from_anywhere(start):
    server, fake = start(api_key=(ALICE,))
    answer = call(server, "GET", "/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.status == 200 and answer.headers["Content-Type"] == "text/html; charset=utf-8"
    page, policy = answer.body.decode(), answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "connect-src 'self'" in policy
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(|https?://""", page)
    assert len(page.splitlines()) < 150 and page == proxy_module.PAGE
    assert call(server, "HEAD", "/", headers={"Accept": "text/html"}).body == b"" and fake.requests.empty()
    assert len(call(server, "GET", "/").body.splitlines()) == 1


# ---- Demo --------------------------------------------------------------------------------------


def test_demo_lists_its_models_and_what_each_shows(demo):
    models = call(demo, "GET", "/v1/models").json()["data"]
    assert [m["id"] for m in models] == ["demo-text", "demo-think", "demo-tool", "demo-error"]


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
        url = re.search(r"listening on http://127.0.0.1:(\d+)", process.stderr.readline())
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
        assert f"upstream: http://127.0.0.1:{port};" in lines[1]
        assert lines[2].startswith("warning: can't reach Ollama") and "--demo" in lines[2]


@pytest.mark.parametrize("arguments, environ, text", [
    (["--listen", "127.0.0.1:99999"], {}, "--listen"),
    (["--listen", "no host"], {}, "no host"),
    (["--listen", "192.0.2.1:0", "--insecure"], {}, "can't listen"),
    (["--listen", "https://127.0.0.1:1"], {}, "HOST:PORT"),
    (["--upstream", "ftp://box"], {}, "--upstream"),
    (["--upstream", "http://user@box"], {}, "--upstream"),
    (["--upstream", "http://127.0.0.1:1x"], {}, "--upstream"),
    (["--upstream", "127.0.0.1:11435"], {}, "own address"),
    (["--upstream", "127.0.0.1:11434/v1"], {}, "remove /v1"),
    (["--idle-timeout", "0"], {}, "--idle-timeout"),
    (["--idle-timeout", "nan"], {}, "--idle-timeout"),
    (["--nosuch"], {}, "--nosuch"),
    (["--listen", "0.0.0.0:0"], {}, "--insecure"), (["--api-key", "short"], {}, "--api-key"),
    (["--api-key-file", "/nonexistent/keys"], {}, "/nonexistent/keys"),
    (["--tls-cert", "/nonexistent/cert"], {}, "/nonexistent/cert"),
    (["--tls-key", "/nonexistent/key"], {}, "/nonexistent/key"),
    (["--demo", "--upstream", "box"], {}, "--demo and --upstream"),
    (["--listen", ":65536"], {}, "above 65535"), (["--option", "num_ctx"], {}, "num_ctx=VALUE"),
    (["--api-key", "sk-0123456789", "sk-9876543210"], {}, "belongs to no flag"),
    (["--hooks", "/nonexistent/hooks.py"], {}, "/nonexistent/hooks.py"),
    (["--alias", "x"], {}, "--alias"), (["--option", "num_ctx=big"], {}, "of type integer"),
    (["--option", "nosuch=1"], {}, "nosuch"), (["--keep-alive", "soon"], {}, "--keep-alive"),
    (["--log", "xml"], {}, "--log"), 
    ([], {"NDJSON_SSE_PROXY_OPTION": "num_ctx=1 top_k=x"}, "top_k"),
    (["--upstream", "http://127.0.0.1:1/é"], {}, "--upstream"),
    (["--demo", "--listen", "127.0.0.1:0"], {"OLLAMA_API_KEY": "a\nb"}, "OLLAMA_API_KEY"),
    ([], {"NDJSON_SSE_PROXY_IDLE_TIMEOUT": "soon"}, "NDJSON_SSE_PROXY_IDLE_TIMEOUT"),
    ([], {"NDJSON_SSE_PROXY_DEMO": "perhaps"}, "NDJSON_SSE_PROXY_DEMO"),
    ([], {"NDJSON_SSE_PROXY_LISTNE": "127.0.0.1:0"}, "NDJSON_SSE_PROXY_LISTNE is not a setting"),
    ([], {"NDJSON_SSE_PROXY_API_KEY": " "}, "NDJSON_SSE_PROXY_API_KEY is empty"),
    (["--api-key-file", ""], {}, "--api-key-file"), (["--hooks", ""], {}, "--hooks"),
    ([], {"OLLAMA_HOST": "a b"}, "OLLAMA_HOST"),
    pytest.param([], {"NDJSON_SSE_PROXY_api_key": "sk-alice-0123"}, "NDJSON_SSE_PROXY_api_key is not",
                 marks=pytest.mark.skipif(os.name == "nt", reason="all names are in capitals there")),
])
def test_mistake_on_the_command_line_is_one_line_and_status_2(arguments, environ, text):
    with running(*arguments, **environ) as process:
        output = process.stderr.read()
        assert process.wait(DEADLINE) == 2
    assert len(output.splitlines()) == 1 and text in output and "sk-9" not in output, output


def test_port_in_use_is_one_line_and_status_2():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with running("--demo", "--listen", f"127.0.0.1:{port}") as process:
            output = process.stderr.read()
            assert process.wait(DEADLINE) == 2
    assert len(output.splitlines()) == 1 and f"127.0.0.1:{port}" in output


def test_flag_wins_over_environment_and_environment_over_default():
    environ = {"NDJSON_SSE_PROXY_IDLE_TIMEOUT": "5", "OLLAMA_HOST": "0.0.0.0", "NDJSON_SSE_PROXY_DEMO": "1"}
    config = read_settings(["--idle-timeout", "7"], environ)
    assert config.idle_timeout == 7 and config.demo is True
    assert config.upstream.geturl() == "http://0.0.0.0:11434"
    environ["NDJSON_SSE_PROXY_UPSTREAM"] = "box:1"
    assert read_settings([], environ).upstream.geturl() == "http://box:1"
    environ = {"NDJSON_SSE_PROXY_API_KEY": "sk-0123456789 bob:sk-9876543210", "NDJSON_SSE_PROXY_ALIAS": "a=b"}
    settings = read_settings(["--alias", "c=d"], environ)
    assert settings.api_key == [("", "sk-0123456789"), ("bob", "sk-9876543210")] and settings.alias == [("c", "d")]


@pytest.mark.parametrize("text, url", [
    ("", "http://127.0.0.1:11434"), (":8080", "http://127.0.0.1:8080"), ("box", "http://box:11434"),
    ("http://box", "http://box:80"), ("HTTPS://Box/", "HTTPS://Box:443"), ("[::1]:5", "http://[::1]:5"),
    ("http://box:5/ollama/", "http://box:5/ollama")])
def test_upstream_is_read_as_ollama_reads_its_own_variable(text, url):
    assert parse_url(text).geturl().lower() == url.lower()


def test_help_lists_every_setting_and_fits_a_screen_and_a_half():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        read_settings(["--help"], {})
    for flag in proxy_module.FLAGS:
        assert "--" + flag in out.getvalue()
    assert len(out.getvalue().splitlines()) < 60


# ---- Documents ---------------------------------------------------------------------------------


def test_doctests_run():
    result = doctest.testmod(proxy_module)
    assert result.attempted > 15 and result.failed == 0


def readme(heading=""):
    """README, or a section of it."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return (text + "\n## ").split(f"\n## {heading}\n")[1].split("\n## ")[0] if heading else text


def readme_program(name):
    """The source of a Python program in README."""
    return re.search(rf"```python\n# {re.escape(name)}\n(.*?)```", readme(), re.DOTALL)[1]


def readme_block(start):
    """An indented block of README, from its first line."""
    text = readme()
    block = text[text.index(f"\n    {start}\n") + 1:]
    return re.sub("^    ", "", re.match(r"(?:    .*\n|\n(?=    ))+", block)[0], flags=re.MULTILINE)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def accepts(port, process):
    assert process.poll() is None
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True


def test_readme_idea_turns_lines_into_frames(tmp_path):
    fake, port, source = FakeOllama(RECORDED["hello"]), free_port(), readme_program("idea.py")
    for old, new in ("11434", fake.url.rpartition(":")[2]), ("11436", str(port)):
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "idea.py").write_text(source)
    body = b'{"model":"m","messages":[]}'
    with subprocess.Popen([sys.executable, str(tmp_path / "idea.py")], stderr=subprocess.DEVNULL) as process:
        try:
            poll(lambda: accepts(port, process))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
            connection.request("POST", "/", body)
            frames = Answer(connection.getresponse()).body.split(b"\n\n")
        finally:
            process.kill()
            fake.close()
    line, _, received = fake.requests.get(timeout=DEADLINE)
    assert line == "POST /api/chat HTTP/1.1" and received == body
    assert frames[-2:] == [b"data: [DONE]", b""] and len(frames) > 4
    done = [json.loads(frame[len("data: "):])["done"] for frame in frames[:-2]]
    assert done == [False] * (len(done) - 1) + [True]


def test_readme_hooks_limit_models_and_requests_and_note_usage(start, hooks, tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    source = readme_program("hooks.py").replace("PER_MINUTE = 30", "PER_MINUTE = 2")
    server, _ = start(RECORDED["hello"], api_key=(ALICE, BOB), hooks=hooks(source))

    def ask(model, key=ALICE[1], path="/v1/chat/completions"):
        return call(server, "POST", path, {"model": model, "messages": []}, bearer(key))
    assert [ask("other").status, ask("demo-text").status, ask("demo-think", path="/api/chat").status] == [
        403, 200, 200]
    refused = ask("demo-text")
    assert refused.status == 429 and 0 < int(refused.headers["Retry-After"]) <= 61
    assert ask("demo-text", BOB[1]).status == 200

    def rows():  # the hook runs after the answer
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect("usage.db")) as db:
            return db.execute("select * from usage order by caller desc, model").fetchall()
    poll(lambda: len(rows() or ()) == 3)
    assert rows()[1:] == [("alice", "demo-text", 9, 27), ("alice", "demo-think", 9, 27)]
    assert "Traceback" not in "\n".join(log.queue)


def test_readme_names_every_flag_and_no_other():
    flags = {"--" + flag for flag in proxy_module.FLAGS} | {"--version", "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme("Command line"))) == flags


def test_readme_says_of_each_field_what_its_row_does():
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|$", readme("Fields"), re.MULTILINE)
    said = {name: effect for names, effect in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(said) == set(proxy_module.CHAT_FIELDS)
    for name, effect in said.items():
        places = {place for field, _, place, _ in CHAT_CASES if field == name}
        assert effect.startswith("hint") == (places == {HINT}), name
        assert effect.startswith("400") == (places <= {HINT, NAMED_400} and NAMED_400 in places), name


def test_readme_lists_every_route_and_what_is_refused():
    rows = re.findall(r"^\| (.*) \| (.*) \|$", readme("Routes"), re.MULTILINE)
    said = {path: effect for names, effect in rows for path in re.findall("`(/.*?)`", names)}
    assert set(said) == set(proxy_module.ROUTES)
    for path, methods in proxy_module.ROUTES.items():
        assert said[path].startswith("always 403") == (set(methods.values()) == {None}), path


@pytest.mark.skipif(not shutil.which("systemd-analyze") or not os.path.exists("/usr/bin/python3"),
                    reason="no systemd here")
def test_readme_systemd_unit_is_valid(tmp_path):
    unit = tmp_path / "ndjson-sse-proxy.service"
    unit.write_text(readme_block("[Unit]"))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True,
                          check=False, timeout=60)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
    names = set(re.findall(r"NDJSON_SSE_PROXY_(\w+)", unit.read_text()))
    assert names and names <= {flag.upper().replace("-", "_") for flag in proxy_module.FLAGS}


@pytest.fixture
def nginx(start, certificate, tmp_path):
    """README's nginx in front of a proxy: (its port, the fake upstream)."""
    if not shutil.which("nginx"):
        pytest.skip("no nginx here")
    server, fake = start()
    port, config = free_port(), readme_block("upstream ollama_boxes {")
    for old, new in {"127.0.0.1:11435": f"127.0.0.1:{server.server_port}", "listen 443": f"listen 127.0.0.1:{port}",
                     "/etc/nginx/box.lan.pem": certificate[0], "/etc/nginx/box.lan.key": certificate[1]}.items():
        assert old in config
        config = config.replace(old, new)
    folders = "".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in (
        "client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {tmp_path}/pid; error_log stderr; events {{}} "
        f"http {{ access_log off; {folders}\n{config}\n}}")
    process = subprocess.Popen(["nginx", "-e", "stderr", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")])
    try:
        poll(lambda: accepts(port, process))
        yield port, fake
    finally:
        process.terminate()
        process.wait(DEADLINE)


def test_readme_nginx_passes_frames_one_by_one_and_hang_ups_on(nginx, certificate):
    port, fake = nginx
    more = threading.Event()
    fake.steps = (SAID, more, chunk(FINAL) + b"0\r\n\r\n")
    context = ssl.create_default_context(cafile=certificate[0])

    def ask():
        connection = http.client.HTTPSConnection("localhost", port, timeout=DEADLINE, context=context)
        connection.request("POST", "/v1/chat/completions", json.dumps({
            "model": "m", "messages": [], "stream": True}))
        return connection
    connection = ask()
    response = connection.getresponse()
    seen = b""
    while b"some" not in seen:  # while the upstream waits for `more`
        seen += response.readline()
    more.set()
    assert response.read().endswith(b"data: [DONE]\n\n")
    connection.close()
    fake.steps, fake.requests = (HOLD,), queue.Queue()
    connection = ask()
    fake.requests.get(timeout=DEADLINE)
    connection.close()
    assert fake.left.wait(DEADLINE)
