// What the self-tests' libraries export: functions that return the error's text, or null.
#pragma once

#include <exception>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

template <typename F>
const char* caught(F f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
